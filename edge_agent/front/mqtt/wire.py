"""Requests and replies as MQTT messages, both ways; pure: values in, values out (wire contract, section 2.2).

    Publication ─address_of→ Address ─open_request→ Envelope          who asks, until when, what for
    Answer or error ─encode_answer / encode_refusal→ Reply            what is published

MQTT 5 carries what belongs to the request as properties, MQTT 3.1.1 as `parameters` of an Open Inference JSON body. A
reply has the form of its request.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from core.errors import DeadlineExceeded, InvalidRequest, NanofleetError, TooLarge
from core.logs import peer_text
from core.open_inference import binary_body, json_body, protobuf_body
from core.open_inference.messages import (
    BodyLimits,
    InferRequest,
    InferResponse,
    ParameterValue,
    binary_outputs,
    timeout_s,
)
from core.status import STATUS
from core.telemetry import parse_traceparent
from edge_agent.answer import Answer, particulars
from edge_agent.front.mqtt.publication import (
    Publication,
    encode_content_type,
    encode_correlation,
    encode_expiry,
    encode_words,
    with_length,
)
from edge_agent.front.mqtt.topics import DropCause, Topics, Undeliverable
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
# What a client that is asked to come back later should wait at least; chosen: a few queue lengths of a small model.
RETRY_AFTER_MS = 50
_MAX_CONTEXT_CHARS = 512
# The user properties that are terms, each with its name in an Open Inference body.
_TERM_WORDS = tuple(
    (name.replace("_", "-").encode(), name) for name in ("privacy", "priority", "accept_provisional", "deferrable")
)
_MAX_REMEMBERED = 1024
# Header and length 5, topic length 2, packet id 2, properties' length 4, expiry 5.
_PACKET_OVERHEAD_BYTES = 18


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


class Reply(NamedTuple):
    """A message to be published; `properties` are encoded, without the expiry, which is known only then."""

    topic: str
    payload: bytes
    qos: int
    properties: bytes | None
    deadline_s: float
    # Connections that ended before the broker acknowledged it.
    attempts: int = 0

    def properties_at(self, now_s: float) -> bytes | None:
        if self.properties is None:
            return None
        # Rounded up: the broker must not drop a reply that is still of use; the device knows its own deadline.
        expiry_s = min(max(1, math.ceil(self.deadline_s - now_s)), 0xFFFFFFFF)
        return with_length(encode_expiry(expiry_s) + self.properties)

    @property
    def packet_bytes(self) -> int:
        """An upper bound of its size on the wire."""
        return len(self.payload) + len(self.properties or b"") + len(self.topic.encode()) + _PACKET_OVERHEAD_BYTES

    @property
    def size_bytes(self) -> int:
        return len(self.payload) + len(self.properties or b"") + len(self.topic)


class Wire:
    """The mapping for one agent; it only remembers what it has encoded before."""

    def __init__(self, topics: Topics, *, agent: str, limits: BodyLimits) -> None:
        self._topics = topics
        self._agent = agent
        self._limits = limits
        self._answer_words: dict[tuple[str, str, str, str, bool, bool], bytes] = {}

    def address_of(self, publication: Publication) -> Address:
        """Return who is to be answered, and where.

        Raises:
            Undeliverable: there is nobody whom we may answer.
        """
        if publication.is_retained:
            raise Undeliverable(DropCause.RETAINED, "expected requests without the retain flag: they would come again")
        model, asking, request_id = self._topics.target_of(publication.topic)
        if asking is not None and request_id is not None:
            topic = self._topics.reply_topic_of(asking, request_id)
            return Address(asking, model, topic, request_id.encode(), is_v5=False)
        if publication.response_topic is None:
            raise Undeliverable(DropCause.MISSING_RESPONSE_TOPIC, "expected a Response Topic on an MQTT 5 request")
        client, topic = self._topics.client_of(publication.response_topic)
        if asking is not None and client != asking:
            raise Undeliverable(
                DropCause.FOREIGN_RESPONSE_TOPIC,
                f"expected a Response Topic of the client {asking} that asks, got one of {client}",
            )
        correlation = publication.correlation or b""
        return Address(client, model, topic, correlation[:MAX_CORRELATION_BYTES], is_v5=True)

    def open_request(self, publication: Publication, address: Address) -> Envelope:
        """Return what travels with the request.

        Raises:
            TooLarge: the body is over the limit.
            InvalidRequest: a property is missing or malformed, or, in the 3.1.1 form, the body is.
        """
        if len(publication.payload) > self._limits.max_body_bytes:
            raise TooLarge(
                f"body: expected at most {self._limits.max_body_bytes} bytes, got {len(publication.payload)}"
            )
        return _open_v5(publication, address) if address.is_v5 else self._open_v311(publication, address)

    def decode(self, publication: Publication, address: Address, envelope: Envelope) -> InferRequest:
        """Return the request in the body, in whichever of the three encodings it came.

        Raises:
            NanofleetError: it does not decode.
        """
        if envelope.request is not None:
            return envelope.request
        payload, limits = publication.payload, self._limits
        if envelope.content_type == JSON:
            return json_body.decode_request(payload, model_name=address.model, limits=limits)
        if envelope.content_type == BINARY:
            return binary_body.decode_request(
                payload, header_length=envelope.header_length, model_name=address.model, limits=limits
            )
        return _decode_protobuf(payload, address, limits)

    def encode_answer(
        self, address: Address, request: InferRequest, content_type: str, answer: Answer, *, qos: int, deadline_s: float
    ) -> Reply:
        """Return the reply that carries `answer`.

        Raises:
            NanofleetError: the response has no form in the encoding that was asked for.
        """
        if not address.is_v5:
            payload = json_body.encode_response(_with_parameters(answer, self._agent))
            return Reply(address.topic, payload, qos, None, deadline_s)
        payload, properties = _encode_body(request, content_type, answer.response)
        words = self._words_of(answer)
        changing = [] if answer.confidence is None else [("confidence", f"{answer.confidence:.4f}")]
        if answer.traceparent is not None:
            changing.append(("traceparent", answer.traceparent))
        if answer.measured_j is not None:
            changing.append(("energy-mj", f"{answer.measured_j * 1000:.3f}"))
        encoded = properties + encode_correlation(address.correlation) + words + encode_words(changing)
        return Reply(address.topic, payload, qos, encoded, deadline_s)

    def encode_refusal(self, address: Address, error: NanofleetError, *, qos: int, deadline_s: float) -> Reply:
        """Return the reply that carries `error`."""
        status = STATUS[error.code].http
        # Bounded and printable: a broker may end the connection over a control character in a property.
        message = peer_text(str(error))
        words = {"status": str(status), "agent": self._agent, "final": "1", "reason": error.code.value}
        if error.retryable:
            after_ms = RETRY_AFTER_MS if error.retry_after_s is None else math.ceil(error.retry_after_s * 1000)
            words["retry-after-ms"] = str(after_ms)
        if not address.is_v5:
            parameters: dict[str, ParameterValue] = {key.replace("-", "_"): value for key, value in words.items()}
            payload = orjson.dumps({"error": message, "parameters": {**parameters, "status": status}})
            return Reply(address.topic, payload, qos, None, deadline_s)
        words["status-message"] = message
        encoded = encode_content_type(JSON) + encode_correlation(address.correlation) + encode_words(words.items())
        return Reply(address.topic, orjson.dumps({"error": message}), qos, encoded, deadline_s)

    def _open_v311(self, publication: Publication, address: Address) -> Envelope:
        request = json_body.decode_request(publication.payload, model_name=address.model, limits=self._limits)
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

    def _words_of(self, answer: Answer) -> bytes:
        response = answer.response
        key = (
            response.model_name,
            response.model_version,
            answer.tier.value,
            answer.reason.value,
            answer.is_final,
            answer.is_cached,
        )
        words = self._answer_words.get(key)
        if words is None:
            said = {
                "status": "200",
                "tier": answer.tier.value,
                "model-version": peer_text(response.model_version),
                "agent": self._agent,
                "final": "1" if answer.is_final else "0",
                "reason": answer.reason.value,
            }
            words = encode_words([*said.items(), *([("cache", "hit")] if answer.is_cached else [])])
            if len(self._answer_words) >= _MAX_REMEMBERED:
                self._answer_words.clear()
            self._answer_words[key] = words
        return words


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


def _open_v5(publication: Publication, address: Address) -> Envelope:
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


def _decode_protobuf(payload: bytes, address: Address, limits: BodyLimits) -> InferRequest:
    message = protobuf_body.parse_request(payload, limits=limits)
    if message.model_name and message.model_name != address.model:
        raise InvalidRequest(f"model_name: expected {address.model!r} as in the topic, got {message.model_name[:80]!r}")
    message.model_name = address.model
    return protobuf_body.decode_request(message, limits=limits)


def _encode_body(request: InferRequest, content_type: str, response: InferResponse) -> tuple[bytes, bytes]:
    if content_type == JSON:
        return json_body.encode_response(response), _JSON_PROPERTY
    if content_type == BINARY:
        payload, header_length = binary_body.encode_response(response, binary=binary_outputs(request, response))
        return payload, encode_content_type(BINARY) + encode_words([(HEADER_LENGTH, str(header_length))])
    message = protobuf_body.encode_response(response, raw=request.binary_output)
    return message.SerializeToString(), encode_content_type(PROTOBUF)


_JSON_PROPERTY = encode_content_type(JSON)


def _with_parameters(answer: Answer, agent: str) -> InferResponse:
    response = answer.response
    parameters: dict[str, ParameterValue] = {
        "status": 200,
        "tier": answer.tier.value,
        "model_version": response.model_version,
        "agent": agent,
        "final": int(answer.is_final),
        "reason": answer.reason.value,
    }
    parameters.update(particulars(answer))
    if answer.traceparent is not None:
        parameters["traceparent"] = answer.traceparent
    return InferResponse(response.model_name, response.model_version, response.outputs, response.id, parameters)
