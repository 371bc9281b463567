"""Reply addresses that survive a restart: whatever is read back is either what was written, or refused."""

from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.ids import AgentId, SiteId
from core.open_inference.messages import InferRequest, RequestedOutput
from edge_agent.cascade.policy import Reason
from edge_agent.front.mqtt.envelope import BINARY, JSON, PROTOBUF, Address
from edge_agent.front.mqtt.late_address import (
    MAX_ADDRESS_BYTES,
    LateAddress,
    decode_late_address,
    encode_late_address,
)
from edge_agent.front.mqtt.topics import Topics, Undeliverable

TOPIC = "nf/v1/berlin/clients/camera-1/replies"
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
ADDRESSES = st.builds(
    LateAddress,
    st.builds(
        Address,
        st.just("camera-1"),
        st.from_regex(r"\A[a-z0-9]{1,64}\Z"),
        st.sampled_from([TOPIC, f"{TOPIC}/a", f"{TOPIC}/a/b"]),
        st.binary(min_size=1, max_size=128),
        st.booleans(),
    ),
    st.sampled_from([0, 1]),
    st.sampled_from([JSON, BINARY, PROTOBUF]),
    st.just(InferRequest("digits", ())),
    st.sampled_from(list(Reason)),
    st.none() | st.floats(0, 1),
)
OUTPUTS = st.lists(st.builds(RequestedOutput, NAMES, st.none() | st.booleans()), max_size=8)


def topics(site: str = "berlin") -> Topics:
    return Topics(SiteId(site), AgentId("gate-1"))


def late_address(*, outputs: tuple[RequestedOutput, ...] = ()) -> LateAddress:
    address = Address("camera-1", "digits", TOPIC, b"r1", is_v5=True)
    request = InferRequest("digits", (), outputs=outputs)
    return LateAddress(address, 1, JSON, request, Reason.LOW_CONFIDENCE, 0.5)


def encoded() -> bytes:
    written = encode_late_address(late_address())
    assert written is not None
    return written


@given(ADDRESSES, OUTPUTS, st.booleans())
def test_an_address_survives_the_round_trip(late: LateAddress, outputs: list[RequestedOutput], is_binary: bool) -> None:
    asked = InferRequest(late.address.model, (), outputs=tuple(outputs), binary_output=is_binary)
    late = late._replace(request=asked)
    written = encode_late_address(late)
    assert written is not None
    assert decode_late_address(written, topics()) == late


@given(st.binary(max_size=200))
def test_whatever_the_bytes_an_address_decodes_or_is_refused(content: bytes) -> None:
    with suppress(InvalidRequest, Undeliverable):
        decode_late_address(content, topics())


@given(
    st.sampled_from(list("vtcpqkmobrf")),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
)
def test_whatever_stands_in_a_field_an_address_decodes_or_is_refused(field: str, value: Any) -> None:
    with suppress(InvalidRequest, Undeliverable, orjson.JSONEncodeError):
        decode_late_address(orjson.dumps({**orjson.loads(encoded()), field: value}), topics())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", 2),
        ("t", ""),
        ("t", 7),
        ("c", ""),
        ("c", "not base64!"),
        ("c", "QQ==" * 200),
        ("p", 4),
        ("p", True),
        ("q", 2),
        ("q", True),
        ("k", "text/html"),
        ("m", "x" * 65),
        ("o", [["scores", 1]]),
        ("o", [["", None]]),
        ("o", [["scores"]]),
        ("o", [["scores", None]] * 65),
        ("b", 1),
        ("r", "because"),
        ("f", 2.0),
        ("f", "high"),
    ],
)
def test_a_field_that_was_not_written_so_is_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match="reply address"):
        decode_late_address(orjson.dumps({**orjson.loads(encoded()), field: value}), topics())


def test_a_field_that_is_missing_is_refused() -> None:
    fields = orjson.loads(encoded())
    del fields["t"]
    with pytest.raises(InvalidRequest, match="reply address"):
        decode_late_address(orjson.dumps(fields), topics())


def test_an_address_of_another_site_is_refused() -> None:
    with pytest.raises(Undeliverable):
        decode_late_address(encoded(), topics("paris"))


def test_a_topic_outside_of_the_clients_replies_is_refused() -> None:
    fields = {**orjson.loads(encoded()), "t": "nf/v1/berlin/agents/gate-1/status"}
    with pytest.raises(Undeliverable):
        decode_late_address(orjson.dumps(fields), topics())


def test_an_address_over_the_limit_is_neither_written_nor_read() -> None:
    outputs = tuple(RequestedOutput("x" * 1000) for _ in range(5))
    assert encode_late_address(late_address(outputs=outputs)) is None
    with pytest.raises(InvalidRequest, match="4096"):
        decode_late_address(b" " * (MAX_ADDRESS_BYTES + 1), topics())
