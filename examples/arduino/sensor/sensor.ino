// A sensor that asks its nearest nanofleet agent over MQTT 3.1.1: ESP32 or ESP8266 with the PubSubClient library.
//
// It measures, asks, and waits for the answer until its deadline. What comes later, or twice, is not taken.
// docs/device-guide.md says what the topics and the words mean.

#include <WiFi.h>
#include <PubSubClient.h>

#include "settings.h"

// One request and one reply fit; PubSubClient's own 256 bytes are too few.
static const uint16_t BUFFER_BYTES = 1024;
static const unsigned long DEADLINE_MS = 2000;
static const unsigned long PERIOD_MS = 5000;
// At most 64 letters, digits, dots, dashes and underscores: it is one segment of a topic.
static const int ID_CHARS = 32;

static WiFiClient network;
static PubSubClient mqtt(network);

static char awaited[ID_CHARS];
static bool is_answered;
static unsigned long count;
// Other after every start, so that an id is never used twice: an agent answers a repeated one from memory.
static unsigned long boot;

// Replies come to …/clients/<client>/replies/<id>.
static void on_message(char *topic, byte *payload, unsigned int length) {
  const char *id = strrchr(topic, '/');
  if (id == NULL || is_answered || strcmp(id + 1, awaited) != 0) {
    return;  // late, a duplicate, or not ours
  }
  is_answered = true;
  Serial.print("answer ");
  Serial.print(awaited);
  Serial.print(": ");
  Serial.write(payload, length);
  Serial.println();
}

static void connect_all() {
  while (WiFi.status() != WL_CONNECTED) {
    delay(200);
  }
  while (!mqtt.connected()) {
    if (mqtt.connect(CLIENT_ID)) {
      mqtt.subscribe("nf/v1/" SITE "/clients/" CLIENT_ID "/replies/+");
    } else {
      // Not all sensors of a site at the same moment after a power cut.
      delay(500 + random(1500));
    }
  }
}

static bool ask(const float *values, int size) {
  char topic[160], body[512];
  snprintf(awaited, sizeof awaited, "%lx-%lu", boot, ++count);
  is_answered = false;
  snprintf(topic, sizeof topic, "nf/v1/" SITE "/infer/" AGENT "/" MODEL "/" CLIENT_ID "/%s", awaited);

  int used = snprintf(body, sizeof body,
                      "{\"parameters\":{\"deadline_ms\":%lu,\"privacy\":\"site\"},"
                      "\"inputs\":[{\"name\":\"" INPUT "\",\"datatype\":\"FP32\",\"shape\":[1,%d],\"data\":[",
                      DEADLINE_MS, size);
  for (int i = 0; i < size; ++i) {
    // Bounds first: a body that does not fit must not be sent.
    if (used < 0 || used >= (int)sizeof body) {
      return false;
    }
    used += snprintf(body + used, sizeof body - used, "%s%.4f", i == 0 ? "" : ",", (double)values[i]);
  }
  if (used < 0 || used + 4 >= (int)sizeof body) {
    return false;
  }
  strcpy(body + used, "]}]}");

  if (!mqtt.publish(topic, body)) {
    return false;
  }
  const unsigned long started = millis();
  while (!is_answered && millis() - started < DEADLINE_MS) {
    mqtt.loop();
    delay(1);
  }
  return is_answered;
}

void setup() {
  Serial.begin(115200);
  boot = (unsigned long)random(0x7fffffff);
  WiFi.begin(WIFI_NAME, WIFI_PASSWORD);
  mqtt.setServer(BROKER_HOST, BROKER_PORT);
  mqtt.setBufferSize(BUFFER_BYTES);
  mqtt.setCallback(on_message);
}

void loop() {
  connect_all();
  float values[INPUT_SIZE];
  for (int i = 0; i < INPUT_SIZE; ++i) {
    values[i] = analogRead(i) / 4095.0f;
  }
  if (!ask(values, INPUT_SIZE)) {
    Serial.println("no answer in time");
  }
  delay(PERIOD_MS);
}
