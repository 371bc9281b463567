"""A sensor that asks its nearest nanofleet agent over MQTT 3.1.1: MicroPython with umqtt.simple.

On a board: `mpremote mip install umqtt.simple`, then copy this file. docs/device-guide.md says what the topics and the
words mean.
"""

import json
import os
import time

from umqtt.simple import MQTTClient

MAX_AGENTS = 8


class Sensor:
    """Finds the agents of its site by their retained status and asks the nearest, one question at a time."""

    def __init__(self, client_id, site, host, port=1883):
        self._base = "nf/v1/" + site
        self._client_id = client_id
        # By name: [epoch, is it there, milliseconds that its last answer took; 0: not asked yet].
        self._agents = {}
        self._awaited = None
        self._reply = None
        self._count = 0
        # Other after every start, so that an id is never used twice: an agent answers a repeated one from memory.
        self._boot = "".join(f"{byte:02x}" for byte in os.urandom(4))
        self._mqtt = MQTTClient(client_id, host, port, keepalive=30)
        self._mqtt.set_callback(self._on_message)

    def connect(self):
        self._mqtt.connect()
        self._mqtt.subscribe(f"{self._base}/agents/+/status")
        self._mqtt.subscribe(f"{self._base}/clients/{self._client_id}/replies/+")

    def ask(self, model, name, values, deadline_ms=2000, privacy="site"):
        """Return the reply as a dictionary; None: none came in time."""
        self._count += 1
        self._awaited = f"{self._boot}-{self._count}"
        self._reply = None
        asked = []
        started = time.ticks_ms()
        tensor = {"name": name, "datatype": "FP32", "shape": [1, len(values)], "data": values}
        while not self._is_answered() and time.ticks_diff(time.ticks_ms(), started) < deadline_ms:
            left = [agent for agent in self._agents if self._agents[agent][1] and agent not in asked]
            if not left:
                if asked and self._reply is not None:
                    break  # all refused
                self._wait(1)
                continue
            # Each agent gets its share of the time that is left, under the same id.
            agent = min(left, key=lambda each: self._agents[each][2])
            asked.append(agent)
            sent = time.ticks_ms()
            left_ms = deadline_ms - time.ticks_diff(sent, started)
            body = {"parameters": {"deadline_ms": left_ms, "privacy": privacy}, "inputs": [tensor]}
            self._reply = None
            # QoS 0: a question that is lost is asked again, with new values.
            topic = f"{self._base}/infer/{agent}/{model}/{self._client_id}/{self._awaited}"
            self._mqtt.publish(topic, json.dumps(body))
            share_ms = left_ms if len(left) == 1 else left_ms // 2
            while self._reply is None and self._agents[agent][1] and time.ticks_diff(time.ticks_ms(), sent) < share_ms:
                self._wait(2)
            # Who did not answer is asked last the next time.
            took_ms = time.ticks_diff(time.ticks_ms(), sent)
            self._agents[agent][2] = took_ms if self._is_answered() else deadline_ms
        self._awaited = None
        return self._reply

    def close(self):
        self._mqtt.disconnect()

    def _wait(self, ms):
        self._mqtt.check_msg()
        time.sleep_ms(ms)

    def _is_answered(self):
        return self._reply is not None and self._reply["parameters"]["status"] == 200

    def _on_message(self, topic, payload):
        *_, kind, last = topic.decode().split("/")
        if last == "status":
            self._note(kind, json.loads(payload))
        elif self._awaited is not None and not self._is_answered() and last == self._awaited:
            # Late ones, duplicates and those of others are not taken.
            self._reply = json.loads(payload)

    def _note(self, agent, status):
        epoch, _, took_ms = self._agents.get(agent, [0, False, 0])
        # A Will of an older connection is no news; a new connection gets a new chance.
        if status["epoch"] >= epoch and (agent in self._agents or len(self._agents) < MAX_AGENTS):
            is_there = status["state"] == "online"
            self._agents[agent] = [status["epoch"], is_there, took_ms if status["epoch"] == epoch else 0]


def main(host="192.168.1.10", port=1883, site="berlin", model="digits-nano", name="pixels"):
    sensor = Sensor("sensor-2", site, host, port)
    sensor.connect()
    for values in ([0.1, 0.9, 0.2], [0.3, 0.3, 0.3]):
        reply = sensor.ask(model, name, values)
        if reply is None:
            print("no answer in time")
        elif reply["parameters"]["status"] != 200:
            print("refused:", reply["error"])
        else:
            print(reply["parameters"]["tier"], reply["outputs"][0]["data"])
    sensor.close()


if __name__ == "__main__":
    main()
