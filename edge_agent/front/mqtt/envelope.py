"""What travels with a request over MQTT: who asks, until when an answer is of use, and what else it says. Pure.

Read from the properties of MQTT 5 or the `parameters` of a 3.1.1 body (wire contract, section 2.2); `wire` is the whole
mapping, this its half that faces the peers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from core.errors import DeadlineExceeded, InvalidRequest
from core.open_inference.messages import InferRequest, timeout_s
from core.telemetry import parse_traceparent
from edge_agent.front.mqtt.publication import Publication
from edge_agent.terms import NO_TERMS, Terms, terms_of

JSON = "application/json"
BINARY = "application/octet-stream"
PROTOBUF = "application/protobuf"
HEADER_LENGTH = "inference-header-content-length"

# Chosen: room for a UUID as text, a hash or a counter with a prefix; the reply carries it back.
MAX_CORRELATION_BYTES = 128
# A 3.1.1 request that says nothing of its deadline gets this long.
DEFAULT_DEADLINE_S = 10.0
# Chosen: a day; beyond it a deadline says nothing.
MAX_DEADLINE_MS = 86_400_000
_MAX_CONTEXT_CHARS = 512
# The user properties that are terms, each with its name in an Open Inference body.
_TERM_WORDS = tuple(
    (name.replace("_", "-").encode(), name) for name in ("privacy", "priority", "accept_provisional", "deferrable")
)


class Address(NamedTuple):
    """Where the reply goes, and what tells this request from the client's others."""

    client: str
    model: str
    topic: str
    correlation: bytes
    is_v5: bool


class Envelope(NamedTuple):
    """What travels with a request; `remaining_s` zero or less when it came too late."""

    remaining_s: float
    content_type: str = JSON
    header_length: int = 0
    traceparent: str | None = None
    tracestate: str | None = None
    terms: Terms = NO_TERMS
    # Decoded already, because a 3.1.1 envelope is inside of the body.
    request: InferRequest | None = None
    # The word `probe` as it came; see `probes`.
    probe: object = None


def remaining_s(deadline_ms: int | None, expiry_s: int) -> float:
    """Return how long an answer is of use, by what the broker has left of the Message Expiry Interval.

    The device sets the interval to its deadline, rounded up to seconds; the broker takes off the whole seconds that the
    message waited. It counts by the ticks of its clock, so a wait of n counted seconds may be almost n + 1 long: one
    more is taken off, and no reply is late.
    """
    if deadline_ms is None:
        return float(expiry_s)
    waited_s = math.ceil(deadline_ms / 1000) - expiry_s
    return deadline_ms / 1000 - (waited_s + 1 if waited_s > 0 else 0)


def within_timeout(remaining: float, request: InferRequest) -> float:
    """Return the time left when the body's own `timeout` parameter counts too."""
    limit_s = timeout_s(request)
    return remaining if limit_s is None else min(remaining, limit_s)


def of_properties(publication: Publication, address: Address) -> Envelope:
    """Return what the properties of an MQTT 5 request say.

    Raises:
        InvalidRequest: one is missing or malformed.
        DeadlineExceeded: the broker has counted its expiry to nothing.
    """
    if not publication.correlation or len(publication.correlation) > MAX_CORRELATION_BYTES:
        got = len(publication.correlation or b"")
        raise InvalidRequest(f"Correlation Data: expected 1 to {MAX_CORRELATION_BYTES} bytes, got {got}")
    words = dict(publication.words)
    deadline_ms = words.get(b"deadline-ms")
    if publication.expiry_s is None and deadline_ms is not None:
        # Its device set one with it; mosquitto 2.0 hands a message with zero seconds left on without (measured).
        raise DeadlineExceeded("the broker counted the Message Expiry Interval down to nothing")
    if publication.expiry_s is None:
        raise InvalidRequest("Message Expiry Interval: expected one on every request, got none")
    content_type = _content_type(publication.content_type)
    return Envelope(
        remaining_s(None if deadline_ms is None else _milliseconds(_text(deadline_ms)), publication.expiry_s),
        content_type,
        _header_length(words) if content_type == BINARY else 0,
        _traceparent(_optional_text(words.get(b"traceparent"))),
        _tracestate(_optional_text(words.get(b"tracestate"))),
        _terms(words, publication.words, client=address.client),
        probe=words.get(b"probe"),
    )


def of_body(request: InferRequest, address: Address) -> Envelope:
    """Return what the parameters of a 3.1.1 request say.

    Raises:
        InvalidRequest: one is malformed.
    """
    deadline_ms = _parameter(request, "deadline_ms", (int, str))
    remaining_s = DEFAULT_DEADLINE_S if deadline_ms is None else _milliseconds(str(deadline_ms)) / 1000
    return Envelope(
        within_timeout(remaining_s, request),
        traceparent=_traceparent(_parameter(request, "traceparent", (str,))),
        tracestate=_tracestate(_parameter(request, "tracestate", (str,))),
        terms=terms_of(request.parameters, client=address.client),
        request=request,
        probe=request.parameters.get("probe"),
    )


def _content_type(value: bytes) -> str:
    if not value or value == b"application/json":
        return JSON
    text = _text(value).partition(";")[0].strip().lower()
    if text not in (JSON, BINARY, PROTOBUF):
        raise InvalidRequest(f"Content Type: expected {JSON}, {BINARY} or {PROTOBUF}, got {text[:80]!r}")
    return text


def _header_length(words: Mapping[bytes, bytes]) -> int:
    text = _text(words.get(HEADER_LENGTH.encode(), b""))
    if not text.isdecimal() or len(text) > 10:
        raise InvalidRequest(f"{HEADER_LENGTH}: expected the number of bytes of the JSON header, got {text[:80]!r}")
    return int(text)


def _milliseconds(text: str) -> int:
    if not text.lstrip("-").isdecimal() or len(text) > 10 or int(text) > MAX_DEADLINE_MS:
        raise InvalidRequest(f"deadline-ms: expected milliseconds up to {MAX_DEADLINE_MS}, got {text[:80]!r}")
    return int(text)


def _terms(words: Mapping[bytes, bytes], all_words: Sequence[tuple[bytes, bytes]], *, client: str) -> Terms:
    said = {name: _text(words[word]) for word, name in _TERM_WORDS if word in words}
    # The strictest counts when a device says several.
    if "privacy" in said:
        said["privacy"] = _privacy(all_words) or ""
    return terms_of(said, client=client) if said else Terms(client)


def _privacy(words: Sequence[tuple[bytes, bytes]]) -> str | None:
    classes = {value for key, value in words if key == b"privacy"}
    # Several that differ are no class, and what is no class is refused.
    return _text(b" ".join(sorted(classes))) if classes else None


def _optional_text(value: bytes | None) -> str | None:
    return None if value is None else _text(value)


def _traceparent(text: str | None) -> str | None:
    # A malformed one is no reason to refuse (Trace Context, section 3.2.2), but it goes to no other process either.
    if text is None or len(text) > _MAX_CONTEXT_CHARS or parse_traceparent(text) is None:
        return None
    return text


def _tracestate(text: str | None) -> str | None:
    if text is None or len(text) > _MAX_CONTEXT_CHARS or not (text.isascii() and text.isprintable()):
        return None
    return text


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _parameter(request: InferRequest, name: str, types: tuple[type, ...]) -> Any:
    value = request.parameters.get(name)
    if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
        raise InvalidRequest(f"parameter {name!r}: expected {types[0].__name__}, got {str(value)[:80]!r}")
    return value
