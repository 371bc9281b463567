// The interface of the Arduino library PubSubClient on libmosquitto, as far as examples/arduino uses it.
#pragma once

#include "Arduino.h"
#include "WiFi.h"

#include <mosquitto.h>

class PubSubClient {
 public:
  typedef void (*Callback)(char *, byte *, unsigned int);

  explicit PubSubClient(WiFiClient &) { mosquitto_lib_init(); }

  void setServer(const char *host, int port) {
    host_ = host;
    port_ = port;
  }

  void setBufferSize(uint16_t size) { buffer_bytes_ = size; }

  void setCallback(Callback callback) { callback_ = callback; }

  bool connect(const char *client_id) {
    mosquitto_ = mosquitto_new(client_id, true, this);
    mosquitto_connect_callback_set(mosquitto_, [](mosquitto *, void *self, int code) {
      static_cast<PubSubClient *>(self)->is_connected_ = code == 0;
    });
    mosquitto_message_callback_set(mosquitto_, [](mosquitto *, void *self, const mosquitto_message *message) {
      static_cast<PubSubClient *>(self)->receive(message);
    });
    if (mosquitto_connect(mosquitto_, host_, port_, 30) != MOSQ_ERR_SUCCESS) {
      return false;
    }
    const unsigned long started = millis();
    while (!is_connected_ && millis() - started < 5000) {
      loop();
    }
    return is_connected_;
  }

  bool connected() { return is_connected_; }

  bool subscribe(const char *topic) {
    return mosquitto_subscribe(mosquitto_, nullptr, topic, 0) == MOSQ_ERR_SUCCESS;
  }

  bool publish(const char *topic, const char *payload) {
    const size_t length = strlen(payload);
    // As the library: header, topic and payload must fit its buffer.
    if (7 + strlen(topic) + length > buffer_bytes_) {
      return false;
    }
    return mosquitto_publish(mosquitto_, nullptr, topic, (int)length, payload, 0, false) == MOSQ_ERR_SUCCESS;
  }

  bool loop() {
    if (mosquitto_loop(mosquitto_, 1, 1) != MOSQ_ERR_SUCCESS) {
      is_connected_ = false;
    }
    return is_connected_;
  }

 private:
  void receive(const mosquitto_message *message) {
    // What does not fit its buffer the library drops.
    if (7 + strlen(message->topic) + (size_t)message->payloadlen <= buffer_bytes_) {
      callback_(message->topic, static_cast<byte *>(message->payload), (unsigned int)message->payloadlen);
    }
  }

  mosquitto *mosquitto_ = nullptr;
  const char *host_ = "";
  int port_ = 0;
  Callback callback_ = nullptr;
  bool is_connected_ = false;
  uint16_t buffer_bytes_ = 256;
};
