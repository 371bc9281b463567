"""Probes and load: what tells devices how near this agent is, and how busy, without running a model for it.

A probe is a request with the word `probe` (1): over MQTT 5 a user property, over 3.1.1 a parameter of a body that is
otherwise an ordinary one. It goes to the topic of any request, so access lists need no rule for it; the reply is sent
at once and has the load in its body. The same load stands in the status message, which is published anew when its class
has changed, and not more than once in `WATCH_S`: an idle agent stays silent.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

import orjson

from core.errors import InvalidRequest
from edge_agent.front.mqtt.envelope import JSON, Address
from edge_agent.front.mqtt.publication import encode_content_type, encode_correlation, encode_words
from edge_agent.front.mqtt.wire import Reply

WATCH_S = 1.0
_YES, _NO = (b"1", "1", 1, True), (None, b"0", "0", 0, False)
# Shares of what may be under way, from which on an agent is busy, and from which down it is so no more.
_BUSY_RATIO, _FREE_RATIO = 0.5, 0.25


class LoadClass(Enum):
    FREE = "free"
    BUSY = "busy"
    FULL = "full"


class Load(NamedTuple):
    """What is under way. `room`: so many more requests are taken now."""

    in_flight: int
    queued: int
    room: int

    def to_json(self) -> Mapping[str, object]:
        return self._asdict()


def class_of(load: Load, before: LoadClass) -> LoadClass:
    """Return the class of a load, with some play, so that it does not change to and fro."""
    if load.room <= 0:
        return LoadClass.FULL
    limit = load.in_flight + load.room
    ratio = _FREE_RATIO if before is not LoadClass.FREE else _BUSY_RATIO
    return LoadClass.BUSY if load.in_flight >= math.ceil(limit * ratio) else LoadClass.FREE


async def watch(measure: Callable[[], Load], announce: Callable[[], None]) -> None:
    """Announce whenever the class of the load has changed; runs until cancelled."""
    said = LoadClass.FREE
    while True:
        await asyncio.sleep(WATCH_S)
        found = class_of(measure(), said)
        if found is not said:
            said = found
            announce()


def asks_for_load(value: object) -> bool:
    """Return whether the word `probe`, as it came, makes a request a probe.

    Raises:
        InvalidRequest: it is neither 0 nor 1.
    """
    if value in _NO:
        return False
    if value in _YES:
        return True
    raise InvalidRequest(f"probe: expected 0 or 1, got {str(value)[:80]!r}")


def encode_load(address: Address, load: Load, *, agent: str, deadline_s: float) -> Reply:
    """Return the reply to a probe; at QoS 0, since a lost one says something too."""
    words: Mapping[str, str | int] = {"status": 200, "agent": agent, "final": 1, "reason": "probe"}
    if not address.is_v5:
        payload = orjson.dumps({"load": load.to_json(), "parameters": words})
        return Reply(address.topic, payload, 0, None, deadline_s)
    encoded = encode_words((name, str(value)) for name, value in words.items())
    properties = encode_content_type(JSON) + encode_correlation(address.correlation) + encoded
    return Reply(address.topic, orjson.dumps({"load": load.to_json()}), 0, properties, deadline_s)
