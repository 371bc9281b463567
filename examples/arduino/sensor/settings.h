// What differs from sensor to sensor.

#define WIFI_NAME "workshop"
#define WIFI_PASSWORD "change me"

#define BROKER_HOST "192.168.1.10"
#define BROKER_PORT 1883

// `nanofleet devices list` names it; the sensor finds its agents by itself.
#define SITE "berlin"
#define CLIENT_ID "sensor-1"

// `nanofleet models show MODEL --output json` says the name and the shape of the input.
#define MODEL "digits-nano"
#define INPUT "pixels"
#define INPUT_SIZE 3
