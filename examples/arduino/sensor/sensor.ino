// A sensor that asks its nearest nanofleet agent over MQTT 3.1.1: ESP32 or ESP8266 with the PubSubClient library.
//
// It finds the agents of its site by their retained status, measures, asks the nearest, and another when that one does
// not answer in its share of the time. What comes after the deadline, or twice, is not taken.
// docs/device-guide.md says what the topics and the words mean.

#include <WiFi.h>
#include <PubSubClient.h>

#include "settings.h"

// One request, one reply and one status fit; PubSubClient's own 256 bytes are too few.
static const uint16_t BUFFER_BYTES = 2048;
static const unsigned long DEADLINE_MS = 2000;
static const unsigned long PERIOD_MS = 5000;
// At most 64 letters, digits, dots, dashes and underscores: it is one segment of a topic.
static const int ID_CHARS = 32;
static const int NAME_CHARS = 65;
static const int MAX_AGENTS = 4;

struct Agent {
  char name[NAME_CHARS];
  unsigned long long epoch;
  bool is_online;
  bool is_asked;
  // What its last answer took; 0: not asked yet.
  unsigned long took_ms;
};

static WiFiClient network;
static PubSubClient mqtt(network);

static Agent agents[MAX_AGENTS];
static int known;
static char awaited[ID_CHARS];
static bool is_answered;
static bool is_refused;
static unsigned long count;
// Other after every start, so that an id is never used twice: an agent answers a repeated one from memory.
static unsigned long boot;

// A status begins {"state":"online","epoch":17…. One with a smaller epoch is of an older connection, and no news.
static void note(const char *name, const char *status) {
  int at = 0;
  while (at < known && strcmp(agents[at].name, name) != 0) {
    ++at;
  }
  if (at == MAX_AGENTS) {
    return;
  }
  Agent &agent = agents[at];
  if (at == known) {
    ++known;
    agent = Agent();
    snprintf(agent.name, sizeof agent.name, "%s", name);
  }
  const char *text = strstr(status, "\"epoch\":");
  const unsigned long long epoch = text == NULL ? 0 : strtoull(text + 8, NULL, 10);
  if (epoch < agent.epoch) {
    return;
  }
  if (epoch > agent.epoch) {
    agent.took_ms = 0;
  }
  agent.epoch = epoch;
  agent.is_online = strstr(status, "\"state\":\"online\"") != NULL;
}

// A status comes to …/agents/<agent>/status, a reply to …/clients/<client>/replies/<id>.
static void on_message(char *topic, byte *payload, unsigned int length) {
  static char text[BUFFER_BYTES];
  if (length >= sizeof text) {
    return;
  }
  memcpy(text, payload, length);
  text[length] = 0;
  char name[NAME_CHARS];
  if (sscanf(topic, "nf/v1/" SITE "/agents/%64[^/]/status", name) == 1) {
    note(name, text);
    return;
  }
  const char *id = strrchr(topic, '/');
  if (id == NULL || is_answered || strcmp(id + 1, awaited) != 0) {
    return;  // late, a duplicate, or not ours
  }
  is_answered = strstr(text, "\"status\":200") != NULL;
  is_refused = !is_answered;
  Serial.print(is_answered ? "answer " : "refusal ");
  Serial.print(awaited);
  Serial.print(": ");
  Serial.println(text);
}

static void connect_all() {
  while (WiFi.status() != WL_CONNECTED) {
    delay(200);
  }
  while (!mqtt.connected()) {
    if (mqtt.connect(CLIENT_ID)) {
      mqtt.subscribe("nf/v1/" SITE "/agents/+/status");
      mqtt.subscribe("nf/v1/" SITE "/clients/" CLIENT_ID "/replies/+");
    } else {
      // Not all sensors of a site at the same moment after a power cut.
      delay(500 + random(1500));
    }
  }
}

// The quickest of those that are there and were not asked yet; NULL: none is left.
static Agent *nearest() {
  Agent *best = NULL;
  for (int at = 0; at < known; ++at) {
    Agent *each = &agents[at];
    if (each->is_online && !each->is_asked && (best == NULL || each->took_ms < best->took_ms)) {
      best = each;
    }
  }
  return best;
}

static bool send(const Agent *agent, const float *values, int size, unsigned long left_ms) {
  char topic[256], body[512];
  snprintf(topic, sizeof topic, "nf/v1/" SITE "/infer/%s/" MODEL "/" CLIENT_ID "/%s", agent->name, awaited);
  int used = snprintf(body, sizeof body,
                      "{\"parameters\":{\"deadline_ms\":%lu,\"privacy\":\"site\"},"
                      "\"inputs\":[{\"name\":\"" INPUT "\",\"datatype\":\"FP32\",\"shape\":[1,%d],\"data\":[",
                      left_ms, size);
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
  return mqtt.publish(topic, body);
}

// One id, one deadline: each agent gets its share of the time that is left.
static bool ask(const float *values, int size) {
  snprintf(awaited, sizeof awaited, "%lx-%lu", boot, ++count);
  is_answered = false;
  for (int at = 0; at < known; ++at) {
    agents[at].is_asked = false;
  }
  const unsigned long started = millis();
  while (!is_answered && millis() - started < DEADLINE_MS) {
    mqtt.loop();
    Agent *agent = nearest();
    if (agent == NULL) {
      delay(1);  // one may appear
      continue;
    }
    agent->is_asked = true;
    is_refused = false;
    const unsigned long asked = millis(), left_ms = DEADLINE_MS - (asked - started);
    const unsigned long share_ms = nearest() == NULL ? left_ms : left_ms / 2;
    if (!send(agent, values, size, left_ms)) {
      return false;
    }
    while (!is_answered && !is_refused && agent->is_online && millis() - asked < share_ms) {
      mqtt.loop();
      delay(1);
    }
    // Who did not answer is asked last the next time.
    agent->took_ms = is_answered ? millis() - asked : DEADLINE_MS;
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
