"""Probes and load: what an agent says of itself so that devices find it."""

import asyncio

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from edge_agent.front.mqtt.envelope import Address
from edge_agent.front.mqtt.probes import WATCH_S, Load, LoadClass, asks_for_load, class_of, encode_load, watch
from edge_agent.front.mqtt.publication import decode_publication

FREE, BUSY, FULL = Load(0, 0, 100), Load(50, 9, 50), Load(100, 9, 0)


def address(*, is_v5: bool) -> Address:
    return Address("camera", "digits", "nf/v1/berlin/clients/camera/replies", b"r1", is_v5)


@pytest.mark.parametrize(("word", "is_probe"), [(b"1", True), (1, True), (True, True), (b"0", False), (None, False)])
def test_the_word_probe_makes_a_request_a_probe(word: object, is_probe: bool) -> None:
    assert asks_for_load(word) is is_probe


@pytest.mark.parametrize("word", [b"yes", b"", 2, [], "\ufeff1", b"1" * 100_000])
def test_another_word_is_refused_rather_than_guessed(word: object) -> None:
    with pytest.raises(InvalidRequest, match="probe: expected 0 or 1"):
        asks_for_load(word)


def test_a_load_has_a_class() -> None:
    assert [class_of(load, LoadClass.FREE) for load in (FREE, BUSY, FULL)] == list(LoadClass)


def test_an_agent_that_was_busy_is_free_again_only_well_below() -> None:
    between = Load(40, 0, 60)
    assert class_of(between, LoadClass.FREE) is LoadClass.FREE
    assert class_of(between, LoadClass.BUSY) is LoadClass.BUSY
    assert class_of(Load(24, 0, 76), LoadClass.BUSY) is LoadClass.FREE


@given(st.integers(0, 1000), st.integers(0, 1000), st.sampled_from(LoadClass))
def test_the_same_load_keeps_its_class(in_flight: int, room: int, before: LoadClass) -> None:
    load = Load(in_flight, 0, room)
    found = class_of(load, before)
    assert class_of(load, found) is found


async def test_a_change_of_class_is_announced_once_and_an_idle_agent_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads = iter([FREE, FREE, FULL, FULL, BUSY, FREE, FREE])
    announced: list[int] = []
    turns = 0

    async def sleep(seconds: float) -> None:
        nonlocal turns
        assert seconds == WATCH_S
        turns += 1

    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(RuntimeError):
        await watch(lambda: next(loads), lambda: announced.append(turns))
    assert announced == [3, 5, 6]


def test_a_probe_is_answered_with_the_load_over_mqtt_5() -> None:
    reply = encode_load(address(is_v5=True), BUSY, agent="gate", deadline_s=5.0)
    assert orjson.loads(reply.payload) == {"load": {"in_flight": 50, "queued": 9, "room": 50}}
    properties = reply.properties_at(0.0)
    assert properties is not None
    publication = decode_publication(0x30, b"\x00\x01t" + properties, has_properties=True)
    assert dict(publication.words)[b"status"] == b"200"
    assert publication.correlation == b"r1"
    assert reply.qos == 0


def test_a_probe_is_answered_with_the_load_over_mqtt_311() -> None:
    reply = encode_load(address(is_v5=False), BUSY, agent="gate", deadline_s=5.0)
    body = orjson.loads(reply.payload)
    assert body["load"]["room"] == 50
    assert body["parameters"] == {"status": 200, "agent": "gate", "final": 1, "reason": "probe"}
