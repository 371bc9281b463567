"""The device client against a real broker; the agent is played by a bare MQTT client."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.client import DeviceClient, MalformedReply, NoReply, Protocol
from edge_agent.client.connection import disable_nagle
from tests.support.mosquitto import Mosquitto, running_mosquitto

SITE = "berlin"
REQUEST = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [0.5]}]}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path) as broker:
        yield broker


class PlayedAgent:
    """Answers every request `copies` times with `payload`, the way an agent would."""

    def __init__(self, broker: Mosquitto, *, payload: dict[str, Any] | bytes, copies: int = 1) -> None:
        self.requests: list[MQTTMessage] = []
        self._payload = payload
        self._copies = copies
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._answer
        self._client.on_socket_open = disable_nagle
        subscribed = threading.Event()
        self._client.on_connect = lambda client, *_: client.subscribe(f"nf/v1/{SITE}/infer/#", qos=1)
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        assert subscribed.wait(5)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _answer(self, client: Client, _user: Any, message: MQTTMessage) -> None:
        self.requests.append(message)
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
        asked: Any = message.properties
        if hasattr(asked, "ResponseTopic"):
            topic = asked.ResponseTopic
            properties.CorrelationData = asked.CorrelationData
            properties.UserProperty = [("status", "200"), ("tier", "edge")]
        else:
            *_, client_id, request_id = message.topic.split("/")
            topic = f"nf/v1/{SITE}/clients/{client_id}/replies/{request_id}"
        payload = self._payload if isinstance(self._payload, bytes) else json.dumps(self._payload)
        for _ in range(self._copies):
            client.publish(topic, payload, qos=1, properties=properties)


@pytest.fixture
def answering(broker: Mosquitto) -> Iterator[PlayedAgent]:
    agent = PlayedAgent(broker, payload={"outputs": [], "parameters": {"status": "200", "tier": "edge"}})
    yield agent
    agent.close()


def device_at(broker: Mosquitto, protocol: Protocol = Protocol.MQTT_5) -> DeviceClient:
    return DeviceClient("camera", site=SITE, broker=(broker.host, broker.port), protocol=protocol)


def status_of(device: DeviceClient) -> int | None:
    try:
        return device.ask("digits", REQUEST, agent="gate", deadline_s=0.5).status
    except NoReply:
        return None


@pytest.mark.parametrize("protocol", Protocol)
def test_a_device_gets_the_reply_to_its_request(broker: Mosquitto, answering: PlayedAgent, protocol: Protocol) -> None:
    with device_at(broker, protocol) as device:
        replies = [device.ask("digits", REQUEST, agent="gate") for _ in range(20)]
    assert [(reply.status, reply.tier) for reply in replies] == [(200, "edge")] * 20
    assert device.counters.duplicates == 0


def test_an_mqtt_5_request_carries_its_deadline_as_properties(broker: Mosquitto, answering: PlayedAgent) -> None:
    with device_at(broker) as device:
        device.ask("digits", REQUEST, agent="gate", deadline_s=2.5, properties={"privacy": "site"})
    properties: Any = answering.requests[0].properties
    assert properties.MessageExpiryInterval == 3
    assert dict(properties.UserProperty) == {"deadline-ms": "2500", "privacy": "site"}


def test_an_mqtt_311_request_carries_its_deadline_in_the_body(broker: Mosquitto, answering: PlayedAgent) -> None:
    with device_at(broker, Protocol.MQTT_311) as device:
        device.ask("digits", REQUEST, agent="gate", deadline_s=2.5, properties={"privacy": "site"})
    assert json.loads(answering.requests[0].payload)["parameters"] == {"deadline_ms": 2500, "privacy": "site"}


def test_many_threads_share_one_device(broker: Mosquitto, answering: PlayedAgent) -> None:
    # Larger than a socket takes at once, so that packets written by two threads would mix.
    large = {"inputs": [{**REQUEST["inputs"][0], "data": [0.5] * 200_000}]}
    with device_at(broker) as device, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(device.ask, "digits", large, agent="gate", deadline_s=30) for _ in range(24)]
        assert [future.result().status for future in asked] == [200] * 24


def test_a_second_reply_to_one_request_is_counted_and_not_delivered(broker: Mosquitto) -> None:
    agent = PlayedAgent(broker, payload={"outputs": []}, copies=2)
    with device_at(broker) as device:
        device.ask("digits", REQUEST, agent="gate")
        device.ask("digits", REQUEST, agent="gate")
    agent.close()
    assert device.counters.duplicates >= 1


def test_no_answer_within_the_deadline_raises_and_forgets_the_request(broker: Mosquitto) -> None:
    with device_at(broker) as device, pytest.raises(NoReply, match=r"expected a reply within 0\.05 s"):
        device.ask("digits", REQUEST, agent="nobody", deadline_s=0.05)


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("payload", [b"[]", b"\xff", b"[" * 100_000])
def test_a_reply_that_is_no_json_object_is_malformed(broker: Mosquitto, protocol: Protocol, payload: bytes) -> None:
    agent = PlayedAgent(broker, payload=payload)
    with device_at(broker, protocol) as device, pytest.raises(MalformedReply, match="expected a JSON reply"):
        device.ask("digits", REQUEST, agent="gate")
    agent.close()


def test_a_device_finds_a_broker_that_was_away(broker: Mosquitto, answering: PlayedAgent) -> None:
    with device_at(broker) as device:
        device.ask("digits", REQUEST, agent="gate")
        broker.kill()
        with pytest.raises(NoReply):
            device.ask("digits", REQUEST, agent="gate", deadline_s=0.2)
        broker.start()
        # The played agent may come back after the device; until then requests reach nobody.
        give_up_s = time.monotonic() + 20
        while (status := status_of(device)) is None:
            assert time.monotonic() < give_up_s
        assert status == 200
    assert device.counters.late == 0


def test_no_broker_is_told_by_its_address(broker: Mosquitto) -> None:
    broker.kill()
    with pytest.raises(NoReply, match=f"broker {broker.address}"):
        device_at(broker).connect(timeout_s=0.3)
