// A device that asks the nearest nanofleet agent over MQTT 3.1.1, and its neighbour when that one fails.
//
//   cc ask.c -o ask -lmosquitto && ./ask 127.0.0.1 1883 berlin camera-1 digits-nano < inputs.json
//
// inputs.json is the value of "inputs" of an Open Inference request. docs/device-guide.md says what topics and words mean.
#include <mosquitto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DEADLINE_MS 2000
#define MAX_AGENTS 8

struct agent { char name[65]; unsigned long long epoch; int is_online; long took_ms; int is_asked; };
static struct agent agents[MAX_AGENTS];
static int known, is_ready, is_answered, is_refused;
static const char *site, *name;
static char id[32], reply[65536], inputs[65536], body[70000];

static long now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

// {"state":"online","epoch":17…: a Will of an older connection is no news.
static void note(const char *agent, const char *status) {
  int at = 0;
  while (at < known && strcmp(agents[at].name, agent) != 0) at++;
  if (at == MAX_AGENTS) return;
  const char *epoch_text = strstr(status, "\"epoch\":");
  unsigned long long epoch = epoch_text == NULL ? 0 : strtoull(epoch_text + 8, NULL, 10);
  if (at == known) {
    memset(&agents[known++], 0, sizeof agents[at]);
    snprintf(agents[at].name, sizeof agents[at].name, "%s", agent);
  }
  if (epoch < agents[at].epoch) return;
  if (epoch > agents[at].epoch) agents[at].took_ms = 0;
  agents[at].epoch = epoch;
  agents[at].is_online = strstr(status, "\"state\":\"online\"") != NULL;
}

static void on_connect(struct mosquitto *client, void *user, int code) {
  char topic[200];
  (void)user;
  if (code != 0) return;
  snprintf(topic, sizeof topic, "nf/v1/%s/agents/+/status", site);
  mosquitto_subscribe(client, NULL, topic, 1);
  snprintf(topic, sizeof topic, "nf/v1/%s/clients/%s/replies/+", site, name);
  mosquitto_subscribe(client, NULL, topic, 1);
}

// What the broker had retained is here before it says that the second subscription is made.
static void on_subscribe(struct mosquitto *client, void *user, int mid, int count, const int *granted) {
  (void)client, (void)user, (void)mid, (void)count, (void)granted;
  is_ready++;
}

static void on_message(struct mosquitto *client, void *user, const struct mosquitto_message *got) {
  char agent[65], form[128];
  static char text[sizeof reply];
  (void)client, (void)user;
  snprintf(text, sizeof text, "%.*s", got->payloadlen, (const char *)got->payload);
  snprintf(form, sizeof form, "nf/v1/%s/agents/%%64[^/]/status", site);
  if (sscanf(got->topic, form, agent) == 1) {
    note(agent, text);
  } else if (strcmp(strrchr(got->topic, '/') + 1, id) == 0 && !is_answered) {
    is_answered = strstr(text, "\"status\":200") != NULL;
    is_refused = !is_answered;
    memcpy(reply, text, sizeof reply);
  }
}

static struct agent *nearest(void) {
  struct agent *best = NULL;
  for (int at = 0; at < known; at++) {
    struct agent *each = &agents[at];
    if (each->is_online && !each->is_asked && (best == NULL || each->took_ms < best->took_ms)) best = each;
  }
  return best;
}

// The whole of failing over: one id, one deadline, and each agent gets its share of the time that is left.
static int ask(struct mosquitto *client, const char *model) {
  long ends_ms = now_ms() + DEADLINE_MS;
  int left = 0;
  is_answered = is_refused = 0;
  for (int at = 0; at < known; at++) left += agents[at].is_online, agents[at].is_asked = 0;
  for (struct agent *agent; !is_answered && (agent = nearest()) != NULL && now_ms() < ends_ms; left--) {
    char topic[400];
    long started_ms = now_ms(), left_ms = ends_ms - started_ms, share_ms = left_ms / (left > 1 ? left : 1);
    snprintf(topic, sizeof topic, "nf/v1/%s/infer/%s/%s/%s/%s", site, agent->name, model, name, id);
    snprintf(body, sizeof body, "{\"parameters\":{\"deadline_ms\":%ld},\"inputs\":%s}", left_ms, inputs);
    agent->is_asked = 1, is_refused = 0;
    mosquitto_publish(client, NULL, topic, (int)strlen(body), body, 1, false);
    while (!is_answered && !is_refused && agent->is_online && now_ms() - started_ms < share_ms) {
      if (mosquitto_loop(client, 10, 1) != MOSQ_ERR_SUCCESS) mosquitto_reconnect(client);
    }
    // Who did not answer is asked last the next time.
    agent->took_ms = is_answered ? now_ms() - started_ms : DEADLINE_MS;
  }
  return is_answered;
}

int main(int count, char **words) {
  if (count != 6) return fprintf(stderr, "usage: %s HOST PORT SITE CLIENT MODEL < inputs.json\n", words[0]), 2;
  site = words[3], name = words[4];
  inputs[fread(inputs, 1, sizeof inputs - 1, stdin)] = '\0';
  // Other after every start: an id is never used twice.
  snprintf(id, sizeof id, "%lx-%lx", (unsigned long)time(NULL), (unsigned long)getpid());
  mosquitto_lib_init();
  struct mosquitto *client = mosquitto_new(name, true, NULL);
  mosquitto_connect_callback_set(client, on_connect);
  mosquitto_subscribe_callback_set(client, on_subscribe);
  mosquitto_message_callback_set(client, on_message);
  if (mosquitto_connect(client, words[1], atoi(words[2]), 30) != MOSQ_ERR_SUCCESS) return perror(words[1]), 1;
  for (long ends_ms = now_ms() + DEADLINE_MS; is_ready < 2 && now_ms() < ends_ms;) mosquitto_loop(client, 10, 1);
  int is_done = ask(client, words[5]);
  puts(is_done || is_refused ? reply : "no answer in time");
  mosquitto_disconnect(client);
  mosquitto_destroy(client);
  mosquitto_lib_cleanup();
  return is_done ? 0 : 1;
}
