"""Requests and replies as MQTT messages, both ways; pure: values in, values out (wire contract, section 2.2).

    Publication ─address_of→ Address ─open_request→ Envelope          who asks, until when, what for
    Answer or error ─encode_answer / encode_refusal→ Reply            what is published

MQTT 5 carries what belongs to the request as properties, MQTT 3.1.1 as `parameters` of an Open Inference JSON body. A
reply has the form of its request.
"""

import math
from typing import NamedTuple

import orjson

from core.errors import InvalidRequest, NanofleetError, TooLarge
from core.logs import peer_text
from core.open_inference import binary_body, json_body, protobuf_body
from core.open_inference.messages import (
    BodyLimits,
    InferRequest,
    InferResponse,
    ParameterValue,
    binary_outputs,
)
from core.status import STATUS
from edge_agent.answer import Answer, particulars
from edge_agent.front.mqtt.envelope import (
    BINARY,
    HEADER_LENGTH,
    JSON,
    MAX_CORRELATION_BYTES,
    PROTOBUF,
    Address,
    Envelope,
    of_body,
    of_properties,
)
from edge_agent.front.mqtt.publication import (
    Publication,
    encode_content_type,
    encode_correlation,
    encode_expiry,
    encode_words,
    with_length,
)
from edge_agent.front.mqtt.topics import DropCause, Topics, Undeliverable

# What a client that is asked to come back later should wait at least; chosen: a few queue lengths of a small model.
RETRY_AFTER_MS = 50
_MAX_REMEMBERED = 1024
# Header and length 5, topic length 2, packet id 2, properties' length 4, expiry 5.
_PACKET_OVERHEAD_BYTES = 18


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
        if address.is_v5:
            return of_properties(publication, address)
        request = json_body.decode_request(publication.payload, model_name=address.model, limits=self._limits)
        return of_body(request, address)

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
