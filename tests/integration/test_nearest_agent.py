"""A device and several agents on a real broker: the nearest is asked, and another when it fails."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.client import DeviceClient, NoReply, Protocol, Reply
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.played_agents import MODEL, SITE, played

REQUEST = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [0.5]}]}
TIMEOUT_S = 10.0
PROTOCOLS = pytest.mark.parametrize("protocol", Protocol)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path) as broker:
        yield broker


def device_at(broker: Mosquitto, protocol: Protocol = Protocol.MQTT_5) -> DeviceClient:
    return DeviceClient("camera", site=SITE, broker=(broker.host, broker.port), protocol=protocol)


def until_first(device: DeviceClient, agent: str) -> None:
    """Wait until `agent` is the one to be asked first."""
    give_up_s = time.monotonic() + TIMEOUT_S
    while device.nearest(MODEL)[0] != agent:
        assert time.monotonic() < give_up_s, device.nearest(MODEL)
        time.sleep(0.02)


def until_known(device: DeviceClient, agents: int) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while len(device.nearest(MODEL)) < agents:
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


@PROTOCOLS
def test_an_agent_is_found_by_its_retained_status(broker: Mosquitto, protocol: Protocol) -> None:
    with played(broker, "gate"), device_at(broker, protocol) as device:
        assert device.ask(MODEL, REQUEST).agent == "gate"


@PROTOCOLS
def test_probes_find_the_nearest_agent(broker: Mosquitto, protocol: Protocol) -> None:
    with played(broker, "far", delay_s=0.15) as [far], played(broker, "near") as [near]:
        with device_at(broker, protocol) as device:
            until_first(device, "near")
            give_up_s = time.monotonic() + TIMEOUT_S
            while not (far.probes and near.probes):
                assert time.monotonic() < give_up_s
                time.sleep(0.02)
            assert {device.ask(MODEL, REQUEST).agent for _ in range(5)} == {"near"}
        assert not far.requests


def test_an_agent_that_says_it_is_full_is_not_asked(broker: Mosquitto) -> None:
    with played(broker, "gate", "dock") as [gate, dock], device_at(broker) as device:
        gate.say(room=0)
        until_first(device, "dock")
        dock.say(room=0)
        gate.say(room=3)
        until_first(device, "gate")


@PROTOCOLS
def test_an_agent_that_refuses_is_left_alone_and_another_answers(broker: Mosquitto, protocol: Protocol) -> None:
    with played(broker, "full", behaviour="refuse") as [full], device_at(broker, protocol) as device:
        until_first(device, "full")
        with played(broker, "free"):
            until_known(device, 2)
            assert {device.ask(MODEL, REQUEST).agent for _ in range(10)} == {"free"}
        assert len(full.requests) <= 1


def test_when_all_agents_refuse_for_longer_than_there_is_time_the_refusal_is_returned(broker: Mosquitto) -> None:
    with played(broker, "gate", "dock", behaviour="refuse"), device_at(broker) as device:
        started_s = time.monotonic()
        assert device.ask(MODEL, REQUEST, deadline_s=5.0).status == 429
        assert time.monotonic() - started_s < 2.0


def test_an_agent_that_lost_the_model_is_followed_by_one_that_has_it(broker: Mosquitto) -> None:
    with played(broker, "stale", behaviour="lack"), played(broker, "gate"), device_at(broker) as device:
        assert {device.ask(MODEL, REQUEST).agent for _ in range(10)} == {"gate"}


@PROTOCOLS
def test_a_silent_agent_leaves_time_for_another_within_the_deadline(broker: Mosquitto, protocol: Protocol) -> None:
    with played(broker, "silent", behaviour="ignore"), device_at(broker, protocol) as device:
        until_first(device, "silent")
        with played(broker, "gate"):
            answered = [device.ask(MODEL, REQUEST, deadline_s=2.0).agent for _ in range(5)]
    assert answered == ["gate"] * 5


@PROTOCOLS
def test_an_agent_that_vanishes_is_followed_at_once_with_the_same_correlation(
    broker: Mosquitto, protocol: Protocol
) -> None:
    with played(broker, "gate", behaviour="ignore") as [gate], device_at(broker, protocol) as device:
        until_first(device, "gate")
        replies: list[Reply] = []
        asking = threading.Thread(target=lambda: replies.append(device.ask(MODEL, REQUEST, deadline_s=60.0)))
        asking.start()
        with played(broker, "dock") as [dock]:
            give_up_s = time.monotonic() + TIMEOUT_S
            while not gate.requests:
                assert time.monotonic() < give_up_s
                time.sleep(0.01)
            started_s = time.monotonic()
            gate.vanish()
            asking.join(TIMEOUT_S)
        # The share of the silent one would have been 30 s.
        assert time.monotonic() - started_s < 5.0
        assert [reply.agent for reply in replies] == ["dock"]
        if protocol is Protocol.MQTT_5:
            assert gate.requests[0].properties.CorrelationData == dock.requests[0].properties.CorrelationData  # type: ignore[union-attr]  # of MQTT 5
        else:
            assert gate.requests[0].topic.rpartition("/")[2] == dock.requests[0].topic.rpartition("/")[2]


def test_of_two_agents_that_answer_one_request_the_device_sees_one_and_counts_the_other(broker: Mosquitto) -> None:
    with played(broker, "gate") as [gate], device_at(broker) as device:
        device.ask(MODEL, REQUEST)
        with played(broker, "dock", delay_s=0.1):
            until_known(device, 2)
            # Longer than its share of the time.
            gate.delay_s = 1.5
            assert device.ask(MODEL, REQUEST, deadline_s=2.5).agent == "dock"
            give_up_s = time.monotonic() + TIMEOUT_S
            while not device.counters.duplicates:
                assert time.monotonic() < give_up_s
                time.sleep(0.02)
    counters = device.counters
    assert (counters.duplicates, counters.repeats, counters.late, counters.strangers) == (1, 1, 0, 0)


def test_an_agent_asked_by_name_is_the_only_one_asked(broker: Mosquitto) -> None:
    with played(broker, "silent", behaviour="ignore"), played(broker, "gate") as [gate], device_at(broker) as device:
        with pytest.raises(NoReply):
            device.ask(MODEL, REQUEST, agent="silent", deadline_s=0.5)
        assert not gate.requests


def test_a_device_that_knows_nobody_gets_its_answer_from_the_agent_that_appears(broker: Mosquitto) -> None:
    with device_at(broker) as device:
        replies: list[Reply] = []
        asking = threading.Thread(target=lambda: replies.append(device.ask(MODEL, REQUEST, deadline_s=20.0)))
        asking.start()
        with played(broker, "gate"):
            asking.join(TIMEOUT_S)
    assert [reply.agent for reply in replies] == ["gate"]


@PROTOCOLS
def test_a_provisional_answer_comes_first_and_the_final_one_is_returned(broker: Mosquitto, protocol: Protocol) -> None:
    provisional: list[Reply] = []
    with played(broker, "gate", behaviour="play") as [gate], device_at(broker, protocol) as device:
        gate.replies = [
            {"status": "200", "tier": "edge", "final": "0", "reason": "low_confidence"},
            {"status": "200", "tier": "heavy"},
        ]
        final = device.ask(MODEL, REQUEST, on_provisional=provisional.append)
    assert [reply.tier for reply in provisional] == ["edge"]
    assert (final.tier, final.is_final) == ("heavy", True)
    assert device.counters.duplicates == 0


def test_a_provisional_answer_is_better_than_none_when_the_final_one_does_not_come(broker: Mosquitto) -> None:
    with played(broker, "gate", behaviour="play") as [gate], device_at(broker) as device:
        gate.replies = [{"status": "200", "tier": "edge", "final": "0", "reason": "low_confidence"}]
        reply = device.ask(MODEL, REQUEST, on_provisional=lambda _: None, deadline_s=0.5)
    assert (reply.tier, reply.is_final) == ("edge", False)


def test_the_verdict_on_a_deferred_request_comes_after_its_answer(broker: Mosquitto) -> None:
    verdicts: list[Reply] = []
    came = threading.Event()

    def note(reply: Reply) -> None:
        verdicts.append(reply)
        came.set()

    device = DeviceClient("camera", site=SITE, broker=(broker.host, broker.port), on_verdict=note)
    with played(broker, "gate", behaviour="play") as [gate], device:
        gate.replies = [
            {"status": "200", "tier": "edge", "final": "0", "reason": "heavy_unavailable"},
            {"status": "200", "tier": "heavy"},
        ]
        reply = device.ask(MODEL, REQUEST, properties={"deferrable": "1"})
        assert came.wait(TIMEOUT_S)
    assert (reply.tier, reply.is_final) == ("edge", False)
    assert [(verdict.tier, verdict.correlation) for verdict in verdicts] == [("heavy", reply.correlation)]
    assert device.counters.duplicates == 0


def test_the_words_of_a_request_travel_with_it(broker: Mosquitto) -> None:
    words = {"privacy": "site", "priority": "1", "deferrable": "1"}
    with played(broker, "gate") as [gate], device_at(broker) as device:
        device.ask(MODEL, REQUEST, properties=words)
    sent = dict(gate.requests[0].properties.UserProperty)  # type: ignore[union-attr]  # of MQTT 5
    assert words.items() <= sent.items()
