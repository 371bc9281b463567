"""A sensor that asks its nearest nanofleet agent over MQTT 3.1.1: MicroPython with umqtt.simple.

On a board: `mpremote mip install umqtt.simple`, then copy this file. docs/device-guide.md says what the topics and the
words mean.
"""

import json
import os
import time

from umqtt.simple import MQTTClient


class Sensor:
    """Asks one agent, one question at a time."""

    def __init__(self, client_id, site, agent, host, port=1883):
        self._base = "nf/v1/" + site
        self._client_id = client_id
        self._agent = agent
        self._awaited = None
        self._reply = None
        self._count = 0
        # Other after every start, so that an id is never used twice: an agent answers a repeated one from memory.
        self._boot = "".join(f"{byte:02x}" for byte in os.urandom(4))
        self._mqtt = MQTTClient(client_id, host, port, keepalive=30)
        self._mqtt.set_callback(self._on_message)

    def connect(self):
        self._mqtt.connect()
        self._mqtt.subscribe(f"{self._base}/clients/{self._client_id}/replies/+")

    def ask(self, model, name, values, deadline_ms=2000, privacy="site"):
        """Return the reply as a dictionary; None: none came in time."""
        self._count += 1
        self._awaited = f"{self._boot}-{self._count}"
        self._reply = None
        topic = f"{self._base}/infer/{self._agent}/{model}/{self._client_id}/{self._awaited}"
        tensor = {"name": name, "datatype": "FP32", "shape": [1, len(values)], "data": values}
        body = {"parameters": {"deadline_ms": deadline_ms, "privacy": privacy}, "inputs": [tensor]}
        # QoS 0: a question that is lost is asked again, with new values.
        self._mqtt.publish(topic, json.dumps(body))
        started = time.ticks_ms()
        while self._reply is None and time.ticks_diff(time.ticks_ms(), started) < deadline_ms:
            self._mqtt.check_msg()
            time.sleep_ms(2)
        self._awaited = None
        return self._reply

    def close(self):
        self._mqtt.disconnect()

    def _on_message(self, topic, payload):
        # Late ones, duplicates and those of others are not taken.
        if self._awaited is not None and self._reply is None and topic.decode().split("/")[-1] == self._awaited:
            self._reply = json.loads(payload)


def main(host="192.168.1.10", port=1883, site="berlin", agent="gate-1", model="digits-nano", name="pixels"):
    sensor = Sensor("sensor-2", site, agent, host, port)
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
