"""The device's side of the MQTT protocol: ask an agent, get one reply. Needs nothing but paho-mqtt."""
