"""Agents of a site, played by a bare MQTT client each: what a device meets when one is slow, full, silent or gone."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.client.connection import disable_nagle
from tests.support.mosquitto import Mosquitto

SITE = "berlin"
MODEL = "digits"


class PlayedAgent:
    """Says that it has MODEL, and treats each request as `behaviour` says: answer, refuse, lack or ignore.

    `replies` are the (payload, properties) of one request's replies, for a behaviour of its own.
    """

    def __init__(self, broker: Mosquitto, agent: str, *, behaviour: str = "answer", delay_s: float = 0.0) -> None:
        self.agent = agent
        self.behaviour = behaviour
        self.delay_s = delay_s
        self.requests: list[MQTTMessage] = []
        self.probes = 0
        self.replies: list[dict[str, str]] = []
        self._broker = broker
        self._epoch = 0
        self._timers: list[threading.Timer] = []

    def start(self) -> None:
        self._epoch += 1
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_socket_open = disable_nagle
        self._client.will_set(self._topic, self._status("offline"), qos=1, retain=True)
        subscribed = threading.Event()
        self._client.on_connect = lambda client, *_: client.subscribe(f"nf/v1/{SITE}/infer/{self.agent}/#", qos=1)
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect(self._broker.host, self._broker.port)
        self._client.loop_start()
        assert subscribed.wait(5)
        self.say(room=8)

    def say(self, *, room: int) -> None:
        self._client.publish(self._topic, self._status("online", room=room), qos=1, retain=True).wait_for_publish(5)

    def vanish(self) -> None:
        """End the connection without a goodbye: the broker publishes the Will."""
        connection: Any = self._client.socket()
        connection.shutdown(2)
        self.stop()

    def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._client.loop_stop()
        # Whatever is left of the connection ends here, and its sockets with the last reference.
        self._client.disconnect()
        self._client.on_message = self._client.on_connect = self._client.on_subscribe = None

    @property
    def _topic(self) -> str:
        return f"nf/v1/{SITE}/agents/{self.agent}/status"

    def _status(self, state: str, **load: int) -> str:
        return json.dumps({"state": state, "epoch": self._epoch, "models": [{"name": MODEL}], "load": load})

    def _on_message(self, _client: Client, _user: Any, message: MQTTMessage) -> None:
        properties: Any = message.properties
        words = dict(getattr(properties, "UserProperty", ()))
        if words.get("probe") or json.loads(message.payload).get("parameters", {}).get("probe"):
            self.probes += 1
            if self.behaviour != "ignore":
                self._after(message, [{"status": "200", "load": "8"}])
            return
        self.requests.append(message)
        self._after(message, self._replies())

    def _replies(self) -> list[dict[str, str]]:
        return {
            "answer": [{"status": "200", "tier": "edge"}],
            "refuse": [{"status": "429", "retry-after-ms": "30000"}],
            "lack": [{"status": "404"}],
            "ignore": [],
            "play": self.replies,
        }[self.behaviour]

    def _after(self, message: MQTTMessage, replies: list[dict[str, str]]) -> None:
        if not self.delay_s:
            self._reply(message, replies)
            return
        timer = threading.Timer(self.delay_s, self._reply, (message, replies))
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _reply(self, message: MQTTMessage, replies: list[dict[str, str]]) -> None:
        asked: Any = message.properties
        for words in replies:
            said = {"agent": self.agent, "final": "1", **words}
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
            if hasattr(asked, "ResponseTopic"):
                topic = asked.ResponseTopic
                properties.CorrelationData = asked.CorrelationData
                properties.UserProperty = list(said.items())
            else:
                *_, client_id, request_id = message.topic.split("/")
                topic = f"nf/v1/{SITE}/clients/{client_id}/replies/{request_id}"
            parameters = {key.replace("-", "_"): value for key, value in said.items()}
            body = {"outputs": [], "load": {"room": 8}, "parameters": parameters}
            self._client.publish(topic, json.dumps(body), qos=1, properties=properties)


@contextmanager
def played(broker: Mosquitto, *agents: str, **given: Any) -> Iterator[list[PlayedAgent]]:
    """Yield started agents; those that are still there are gone afterwards."""
    made = [PlayedAgent(broker, agent, **given) for agent in agents]
    for agent in made:
        agent.start()
    try:
        yield made
    finally:
        for agent in made:
            agent.stop()
