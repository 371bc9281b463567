"""The address of a reply that comes late, as bytes which survive a restart of the agent.

A JSON object of short keys, with a version; it is kept by somebody else, on a disk, and read back with the same
distrust as a message from a device.

    v  1                                t  reply topic            c  correlation data in base64
    p  5 or 3, the form of the reply    q  QoS                    k  content type
    m  model that was asked             o  [[output, is binary or null], …] as asked for
    b  true: outputs are binary unless they say otherwise
    r  why the heavy tier was asked     f  confidence of the edge's answer, or null
"""

import base64
import binascii
from typing import Any, NamedTuple, TypeVar

import orjson

from core.errors import InvalidRequest
from core.open_inference.messages import InferRequest, RequestedOutput
from edge_agent.cascade.policy import Reason
from edge_agent.front.mqtt.envelope import BINARY, JSON, MAX_CORRELATION_BYTES, PROTOBUF, Address
from edge_agent.front.mqtt.topics import Topics, Undeliverable

VERSION = 1
# Chosen: the longest topic, correlation data and name, and a few dozen names of outputs.
MAX_ADDRESS_BYTES = 4096
_MAX_OUTPUTS = 64
_MAX_NAME_CHARS = 1024

_Value = TypeVar("_Value")


class LateAddress(NamedTuple):
    address: Address
    qos: int
    content_type: str
    # What it says of its outputs gives the reply its form; one that was read back has no inputs.
    request: InferRequest
    reason: Reason
    confidence: float | None


def encode_late_address(late: LateAddress) -> bytes | None:
    """Return the bytes of an address; None: its request names more outputs than there is room for."""
    address, request = late.address, late.request
    encoded = orjson.dumps(
        {
            "v": VERSION,
            "t": address.topic,
            "c": base64.b64encode(address.correlation).decode(),
            "p": 5 if address.is_v5 else 3,
            "q": late.qos,
            "k": late.content_type,
            "m": address.model,
            "o": [[output.name, output.binary] for output in request.outputs],
            "b": request.binary_output,
            "r": late.reason.value,
            "f": late.confidence,
        }
    )
    return encoded if len(encoded) <= MAX_ADDRESS_BYTES else None


def decode_late_address(encoded: bytes, topics: Topics) -> LateAddress:
    """Return the address that `encode_late_address` has written.

    Raises:
        InvalidRequest: it is no address of this version.
        Undeliverable: its topic is not one of a client of this site.
    """
    if len(encoded) > MAX_ADDRESS_BYTES:
        raise InvalidRequest(f"reply address: expected at most {MAX_ADDRESS_BYTES} bytes, got {len(encoded)}")
    try:
        return _decoded(orjson.loads(encoded), topics)
    except Undeliverable:
        raise
    except (ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise InvalidRequest(
            f"reply address: expected one of version {VERSION}, got something else: {error}"
        ) from error


def _decoded(fields: Any, topics: Topics) -> LateAddress:
    if not isinstance(fields, dict) or fields["v"] != VERSION:
        raise InvalidRequest("another version")
    client, topic = topics.client_of(_text(fields["t"], 512).encode())
    correlation = _correlation(fields["c"])
    is_v5 = _one_of(fields["p"], (5, 3)) == 5
    model = _text(fields["m"], 64)
    return LateAddress(
        Address(client, model, topic, correlation, is_v5),
        _one_of(fields["q"], (0, 1)),
        _one_of(fields["k"], (JSON, BINARY, PROTOBUF)),
        InferRequest(model, (), outputs=_outputs(fields["o"]), binary_output=_one_of(fields["b"], (True, False))),
        Reason(fields["r"]),
        _confidence(fields["f"]),
    )


def _one_of(value: Any, allowed: tuple[_Value, ...]) -> _Value:
    for each in allowed:
        # True equals 1.
        if type(value) is type(each) and value == each:
            return each
    raise InvalidRequest(f"expected one of {allowed}")


def _text(value: Any, max_chars: int) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= max_chars:
        raise InvalidRequest(f"expected a text of 1 to {max_chars} characters")
    return value


def _correlation(value: Any) -> bytes:
    try:
        correlation = base64.b64decode(_text(value, 4 * MAX_CORRELATION_BYTES), validate=True)
    except binascii.Error as error:
        raise InvalidRequest("expected correlation data in base64") from error
    if not 1 <= len(correlation) <= MAX_CORRELATION_BYTES:
        raise InvalidRequest(f"expected 1 to {MAX_CORRELATION_BYTES} bytes of correlation data")
    return correlation


def _outputs(value: Any) -> tuple[RequestedOutput, ...]:
    if not isinstance(value, list) or len(value) > _MAX_OUTPUTS:
        raise InvalidRequest(f"expected at most {_MAX_OUTPUTS} outputs")
    return tuple(
        RequestedOutput(_text(name, _MAX_NAME_CHARS), None if binary is None else _one_of(binary, (True, False)))
        for name, binary in value
    )


def _confidence(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, float) or not 0 <= value <= 1:
        raise InvalidRequest("expected a confidence of 0.0 to 1.0")
    return value
