"""Requests and replies as MQTT messages: topics, properties, deadlines, encodings, and what is refused."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from core.errors import DeadlineExceeded, InvalidName, InvalidRequest, InvalidTensor, Overloaded, TooLarge, UnknownModel
from core.ids import AgentId, SiteId
from core.open_inference import binary_body, json_body, protobuf_body
from core.open_inference.messages import BodyLimits, InferRequest, InferResponse
from core.tensors import Datatype, Tensor
from edge_agent.answer import Answer
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.front.mqtt.envelope import BINARY, JSON, MAX_CORRELATION_BYTES, PROTOBUF, Address, Envelope, remaining_s
from edge_agent.front.mqtt.publication import (
    Publication,
    decode_publication,
    encode_content_type,
    encode_correlation,
    encode_expiry,
    encode_words,
    with_length,
)
from edge_agent.front.mqtt.topics import DropCause, Topics, Undeliverable
from edge_agent.front.mqtt.wire import Reply, Wire
from edge_agent.terms import Terms
from protos.inference.v2 import open_inference_pb2 as pb

TOPIC = b"nf/v1/berlin/infer/gate-1/digits"
REPLIES = b"nf/v1/berlin/clients/camera-1/replies"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = orjson.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]})
REQUEST = InferRequest("digits", (Tensor("x", Datatype.FP32, np.array([[1, 2]], dtype=np.float32)),))
RESPONSE = InferResponse("digits", "3", (Tensor("s", Datatype.FP32, np.array([[0.5]], dtype=np.float32)),))
ANSWER = Answer(RESPONSE, Tier.EDGE, Reason.CONFIDENT, 0.98765, TRACEPARENT)


def topics() -> Topics:
    return Topics(SiteId("berlin"), AgentId("gate-1"))


def wire(*, max_body_bytes: int = 1 << 20) -> Wire:
    return Wire(topics(), agent="gate-1", limits=BodyLimits(max_body_bytes=max_body_bytes))


def published(
    payload: bytes = BODY,
    *,
    topic: bytes = TOPIC,
    words: Mapping[str, str] | None = None,
    expiry_s: int | None = 5,
    content_type: bytes = b"application/json",
    response_topic: bytes | None = REPLIES,
    correlation: bytes | None = b"r1",
    is_retained: bool = False,
) -> Publication:
    pairs = tuple((key.encode(), value.encode()) for key, value in (words or {}).items())
    return Publication(topic, payload, 1, 9, is_retained, expiry_s, content_type, response_topic, correlation, pairs)


def opened(publication: Publication) -> Envelope:
    mapping = wire()
    return mapping.open_request(publication, mapping.address_of(publication))


def decoded(publication: Publication) -> InferRequest:
    mapping = wire()
    address = mapping.address_of(publication)
    return mapping.decode(publication, address, mapping.open_request(publication, address))


def words_of(reply: Reply) -> dict[str, str]:
    packed = reply.properties_at(0.0)
    assert packed is not None
    properties, _ = Properties(PacketTypes.PUBLISH).unpack(packed)  # type: ignore[no-untyped-call]  # unannotated
    return dict(properties.UserProperty)


# Topics


def test_an_agent_takes_requests_for_itself_and_for_any_in_each_form() -> None:
    assert topics().filters(is_v5=True) == [
        ("nf/v1/berlin/infer/gate-1/+", 1),
        ("nf/v1/berlin/infer/gate-1/+/+", 1),
        ("nf/v1/berlin/infer/gate-1/+/+/+", 0),
        ("$share/nf/nf/v1/berlin/infer/any/+", 1),
        ("$share/nf/nf/v1/berlin/infer/any/+/+", 1),
        ("$share/nf/nf/v1/berlin/infer/any/+/+/+", 0),
    ]


def test_without_shared_subscriptions_an_agent_takes_only_what_is_for_itself() -> None:
    assert topics().filters(is_v5=False) == [("nf/v1/berlin/infer/gate-1/+/+/+", 0)]


def test_a_request_topic_names_the_model() -> None:
    assert topics().target_of(TOPIC) == ("digits", None, None)
    assert topics().target_of(b"nf/v1/berlin/infer/any/digits") == ("digits", None, None)


def test_a_311_request_topic_names_client_and_request_too() -> None:
    assert topics().target_of(TOPIC + b"/camera-1/r1") == ("digits", "camera-1", "r1")
    assert topics().reply_topic_of("camera-1", "r1") == "nf/v1/berlin/clients/camera-1/replies/r1"


@pytest.mark.parametrize(
    "topic",
    [
        b"",
        b"nf/v1/berlin/infer/gate-1/",
        b"nf/v1/berlin/infer/gate-1/digits/camera-1@",
        b"nf/v1/berlin/infer/gate-1/digits/@berlin",
        b"nf/v1/berlin/infer/gate-1/digits/a@b@c",
        b"nf/v1/berlin/infer/gate-1/digits@berlin",
        b"nf/v1/berlin/infer/gate-1/digits/agent:gate-1",
        b"nf/v1/berlin/infer/gate-1/digits//r1",
        b"nf/v1/berlin/infer/gate-1/digits/camera-1/r1/more",
        b"nf/v1/berlin/infer/gate-2/digits",
        b"nf/v1/paris/infer/gate-1/digits",
        b"nf/v1/berlin/infer/gate-1/" + b"a" * 65,
        b"nf/v1/berlin/infer/gate-1/\xff\xfe",
        b"nf/v1/berlin/infer/gate-1/digits/../r1",
        b"nf/v1/berlin/infer/gate-1/digits/+/r1",
        b"nf/v1/berlin/infer/gate-1/dig its",
    ],
)
def test_a_hostile_request_topic_is_dropped(topic: bytes) -> None:
    with pytest.raises(Undeliverable) as caught:
        topics().target_of(topic)
    assert caught.value.cause is DropCause.MALFORMED_TOPIC


@pytest.mark.parametrize("below", [b"", b"/r1", b"/a/b"])
def test_a_response_topic_in_a_clients_own_subtree_is_accepted(below: bytes) -> None:
    assert topics().client_of(REPLIES + below) == ("camera-1", (REPLIES + below).decode())


@pytest.mark.parametrize(
    "topic",
    [
        b"",
        b"somewhere/else",
        b"nf/v1/berlin/clients/camera-1",
        b"nf/v1/berlin/clients/camera-1/requests",
        b"nf/v1/berlin/clients//replies",
        b"nf/v1/berlin/clients/camera-1/replies/",
        b"nf/v1/berlin/clients/camera-1/replies/#",
        b"nf/v1/berlin/clients/+/replies",
        b"nf/v1/berlin/agents/gate-1/status",
        b"nf/v1/paris/clients/camera-1/replies",
        b"$SYS/clients/camera-1/replies",
        b"nf/v1/berlin/clients/camera-1/replies\x00",
        b"nf/v1/berlin/clients/camera-1/replies/" + b"a/" * 300 + b"a",
        b"nf/v1/berlin/clients/camera\xff/replies",
    ],
)
def test_a_foreign_response_topic_is_refused(topic: bytes) -> None:
    with pytest.raises(Undeliverable) as caught:
        topics().client_of(topic)
    assert caught.value.cause is DropCause.FOREIGN_RESPONSE_TOPIC


@given(st.binary(max_size=80))
def test_whatever_the_response_topic_a_reply_stays_in_the_clients_subtree(topic: bytes) -> None:
    try:
        client, text = topics().client_of(topic)
    except Undeliverable:
        return
    assert text.startswith(f"nf/v1/berlin/clients/{client}/replies")


def test_a_request_without_a_response_topic_has_nobody_to_answer() -> None:
    with pytest.raises(Undeliverable) as caught:
        wire().address_of(published(response_topic=None))
    assert caught.value.cause is DropCause.MISSING_RESPONSE_TOPIC


def test_a_retained_request_is_dropped_because_it_would_come_again() -> None:
    with pytest.raises(Undeliverable) as caught:
        wire().address_of(published(is_retained=True))
    assert caught.value.cause is DropCause.RETAINED


# Deadlines


@pytest.mark.parametrize(
    ("deadline_ms", "expiry_s", "expected_s"),
    [
        (2500, 3, 2.5),  # has not waited
        (2500, 9, 2.5),  # the device gave more than it needs
        (5000, 3, 2.0),  # two seconds counted, up to three long
        (2500, 1, -0.5),  # two counted of two and a half
        (1000, 0, -1.0),
        (None, 4, 4.0),
    ],
)
def test_the_time_left_is_the_deadline_without_the_wait(
    deadline_ms: int | None, expiry_s: int, expected_s: float
) -> None:
    assert remaining_s(deadline_ms, expiry_s) == pytest.approx(expected_s)


@given(deadline_ms=st.integers(1, 60_000), waited_s=st.floats(0, 70), tick_s=st.floats(0, 0.999))
def test_no_wait_of_a_counted_second_leaves_more_time_than_there_is(
    deadline_ms: int, waited_s: float, tick_s: float
) -> None:
    """The broker counts by the ticks of its clock: `tick_s` into a second when the message came."""
    counted_s = math.floor(tick_s + waited_s)
    left_s = remaining_s(deadline_ms, math.ceil(deadline_ms / 1000) - counted_s)
    if counted_s:
        assert left_s <= deadline_ms / 1000 - waited_s + 1e-9


@pytest.mark.parametrize("text", ["soon", "1.5", "", "9" * 11, "86400001"])
def test_a_malformed_deadline_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="deadline-ms"):
        opened(published(words={"deadline-ms": text}))


def test_a_negative_deadline_has_passed() -> None:
    assert opened(published(words={"deadline-ms": "-5"})).remaining_s <= 0


# MQTT 5 envelopes


def test_the_properties_of_a_request_are_its_envelope() -> None:
    words = {"deadline-ms": "1500", "traceparent": TRACEPARENT, "tracestate": "a=b", "privacy": "site", "other": "x"}
    envelope = opened(published(words=words, expiry_s=2))
    assert envelope == Envelope(1.5, JSON, 0, TRACEPARENT, "a=b", Terms("camera-1", "site"))


MALFORMED_TRACES = ["", "hello", TRACEPARENT + "\n", TRACEPARENT.replace("b7ad", "zzzz"), "00-" + "0" * 600]
MALFORMED_STATES = ["a=b\n", "a=\u00e9", "a=" + "b" * 600]


@pytest.mark.parametrize("text", MALFORMED_TRACES)
def test_a_malformed_traceparent_is_left_out_in_both_forms(text: str) -> None:
    assert opened(published(words={"traceparent": text})).traceparent is None
    assert opened(published_v311({"traceparent": text})).traceparent is None


@pytest.mark.parametrize("text", MALFORMED_STATES)
def test_a_malformed_tracestate_is_left_out_in_both_forms(text: str) -> None:
    assert opened(published(words={"traceparent": TRACEPARENT, "tracestate": text})).tracestate is None
    assert opened(published_v311({"traceparent": TRACEPARENT, "tracestate": text})).tracestate is None


def test_without_a_content_type_a_body_is_json() -> None:
    assert opened(published(content_type=b"")).content_type == JSON


def test_several_privacy_classes_that_differ_are_none_that_is_known() -> None:
    publication = published()._replace(words=((b"privacy", b"any"), (b"privacy", b"device")))
    assert opened(publication).terms.privacy == "any device"


@pytest.mark.parametrize(
    ("publication", "message"),
    [
        (published(correlation=None), "Correlation Data"),
        (published(correlation=b""), "Correlation Data"),
        (published(correlation=b"c" * (MAX_CORRELATION_BYTES + 1)), "Correlation Data"),
        (published(expiry_s=None), "Message Expiry Interval"),
        (published(content_type=b"text/plain"), "Content Type: expected application/json"),
        (published(content_type=b"\xff"), "Content Type"),
        (published(content_type=BINARY.encode()), "inference-header-content-length"),
        (published(content_type=BINARY.encode(), words={"inference-header-content-length": "-1"}), "header-content"),
    ],
)
def test_a_request_with_a_missing_or_malformed_property_is_refused(publication: Publication, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        opened(publication)


def test_a_deadline_whose_expiry_the_broker_has_counted_to_nothing_is_over() -> None:
    with pytest.raises(DeadlineExceeded):
        opened(published(expiry_s=None, words={"deadline-ms": "3000"}))


def test_a_body_over_the_limit_is_refused_before_it_is_decoded() -> None:
    mapping = wire(max_body_bytes=100)
    publication = published(b"[" * 101)
    with pytest.raises(TooLarge, match="at most 100 bytes, got 101"):
        mapping.open_request(publication, mapping.address_of(publication))


# Bodies


def test_the_three_encodings_carry_the_same_request() -> None:
    body, header_length = binary_body.encode_request(REQUEST)
    binary = published(
        body, content_type=BINARY.encode(), words={"inference-header-content-length": str(header_length)}
    )
    protobuf = published(protobuf_body.encode_request(REQUEST).SerializeToString(), content_type=PROTOBUF.encode())
    for publication in (published(), binary, protobuf):
        request = decoded(publication)
        assert request.model_name == "digits"
        assert request.inputs[0].array.tolist() == [[1, 2]]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs": 1}', b"\xff"])
def test_malformed_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decoded(published(body))


def test_bytes_that_are_no_protobuf_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="ModelInferRequest"):
        decoded(published(b"\xff\xff", content_type=PROTOBUF.encode()))


def test_a_protobuf_body_for_another_model_than_the_topic_is_refused() -> None:
    body = pb.ModelInferRequest(model_name="letters").SerializeToString()
    with pytest.raises(InvalidRequest, match="as in the topic"):
        decoded(published(body, content_type=PROTOBUF.encode()))


# The 3.1.1 form


def published_v311(parameters: Mapping[str, object]) -> Publication:
    body = orjson.dumps({**orjson.loads(BODY), "parameters": parameters})
    return Publication(TOPIC + b"/camera-1/r1", body)


def test_the_envelope_of_a_311_request_is_in_its_body() -> None:
    parameters = {"deadline_ms": 1500, "traceparent": TRACEPARENT, "privacy": "site"}
    envelope = opened(published_v311(parameters))
    assert (envelope.remaining_s, envelope.traceparent) == (1.5, TRACEPARENT)
    assert envelope.request is not None
    assert envelope.request.parameters["privacy"] == "site"


def test_a_311_request_that_names_no_deadline_gets_one() -> None:
    assert opened(published_v311({})).remaining_s == 10.0


@pytest.mark.parametrize("parameters", [{"deadline_ms": "soon"}, {"deadline_ms": True}, {"traceparent": 7}])
def test_a_malformed_311_envelope_is_refused(parameters: Mapping[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        opened(published_v311(parameters))


def test_a_311_reply_says_everything_in_its_body() -> None:
    address = Address("camera-1", "digits", "t", b"r1", is_v5=False)
    reply = wire().encode_answer(address, REQUEST, JSON, ANSWER, qos=1, deadline_s=9.0)
    assert reply.properties_at(0.0) is None
    assert orjson.loads(reply.payload)["parameters"] == {
        "status": 200,
        "tier": "edge",
        "model_version": "3",
        "agent": "gate-1",
        "final": 1,
        "reason": "confident",
        "confidence": 0.9877,
        "traceparent": TRACEPARENT,
    }


def test_a_311_refusal_has_its_status_in_the_body() -> None:
    address = Address("camera-1", "digits", "t", b"r1", is_v5=False)
    reply = wire().encode_refusal(address, UnknownModel("no such model"), qos=0, deadline_s=9.0)
    body = orjson.loads(reply.payload)
    assert (body["error"], body["parameters"]["status"]) == ("no such model", 404)


# Replies


V5 = Address("camera-1", "digits", REPLIES.decode(), b"r1", is_v5=True)


def test_a_reply_has_the_properties_of_the_contract_in_a_form_that_paho_reads() -> None:
    reply = wire().encode_answer(V5, REQUEST, JSON, ANSWER, qos=1, deadline_s=9.2)
    packed = reply.properties_at(5.0)
    assert packed is not None
    properties, size = Properties(PacketTypes.PUBLISH).unpack(packed)  # type: ignore[no-untyped-call]  # unannotated
    assert size == len(packed)
    assert properties.MessageExpiryInterval == 5
    assert properties.CorrelationData == b"r1"
    assert properties.ContentType == JSON
    assert dict(properties.UserProperty) == {
        "status": "200",
        "tier": "edge",
        "model-version": "3",
        "agent": "gate-1",
        "final": "1",
        "reason": "confident",
        "confidence": "0.9877",
        "traceparent": TRACEPARENT,
    }


def test_a_reply_has_the_encoding_of_its_request() -> None:
    mapping = wire()
    as_json = mapping.encode_answer(V5, REQUEST, JSON, ANSWER, qos=0, deadline_s=9)
    assert json_body.decode_response(as_json.payload).outputs[0].array.tolist() == [[0.5]]
    asked_binary = InferRequest("digits", REQUEST.inputs, binary_output=True)
    as_binary = mapping.encode_answer(V5, asked_binary, BINARY, ANSWER, qos=0, deadline_s=9)
    header_length = int(words_of(as_binary)["inference-header-content-length"])
    response = binary_body.decode_response(as_binary.payload, header_length=header_length)
    assert response.outputs[0].array.tolist() == [[0.5]]
    as_protobuf = mapping.encode_answer(V5, REQUEST, PROTOBUF, ANSWER, qos=0, deadline_s=9)
    message = pb.ModelInferResponse.FromString(as_protobuf.payload)
    assert protobuf_body.decode_response(message).outputs[0].array.tolist() == [[0.5]]


def test_a_refusal_carries_status_and_message() -> None:
    error = InvalidTensor("input 'x': expected shape [-1, 2], got [3]")
    reply = wire().encode_refusal(V5, error, qos=1, deadline_s=9)
    words = words_of(reply)
    assert (words["status"], words["status-message"], words["final"]) == ("400", str(error), "1")
    assert orjson.loads(reply.payload) == {"error": str(error)}


def test_an_overload_says_when_to_come_back() -> None:
    words = words_of(wire().encode_refusal(V5, Overloaded("full"), qos=1, deadline_s=9))
    assert words["status"] == "429"
    assert int(words["retry-after-ms"]) > 0


def test_a_message_from_a_peer_is_cut_in_a_refusal() -> None:
    words = words_of(wire().encode_refusal(V5, InvalidName("x" * 100_000), qos=1, deadline_s=9))
    assert len(words["status-message"]) <= 300


def test_texts_from_peers_are_printable_in_properties() -> None:
    refusal = wire().encode_refusal(V5, InvalidName("a\x00b\x1bc\ud800"), qos=1, deadline_s=9)
    assert words_of(refusal)["status-message"] == "a?b?c?"
    response = InferResponse("digits", "3\n\x7f" + "x" * 1000, RESPONSE.outputs)
    reply = wire().encode_answer(V5, REQUEST, JSON, replace(ANSWER, response=response), qos=1, deadline_s=9)
    version = words_of(reply)["model-version"]
    assert version.startswith("3??xxx")
    assert len(version) <= 256


# PUBLISH packets


def packet(topic: bytes, properties: bytes, payload: bytes, *, packet_id: bytes = b"") -> bytes:
    return len(topic).to_bytes(2, "big") + topic + packet_id + with_length(properties) + payload


def test_a_publish_is_decoded_with_all_its_properties() -> None:
    properties = (
        b"\x01\x01"
        + encode_expiry(7)
        + encode_content_type("application/json")
        + encode_correlation(b"\x00\xff")
        + b"\x0b\x81\x01"
        + encode_words([("a", "1"), ("a", "2")])
    )
    found = decode_publication(0x3D, packet(b"t", properties, b"body", packet_id=b"\x00\x09"), has_properties=True)
    assert found == Publication(
        b"t", b"body", 2, 9, True, 7, b"application/json", None, b"\x00\xff", ((b"a", b"1"), (b"a", b"2"))
    )


def test_what_paho_packs_is_what_is_decoded() -> None:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
    properties.ResponseTopic = REPLIES.decode()
    properties.CorrelationData = b"r1"
    properties.MessageExpiryInterval = 300
    properties.UserProperty = [("deadline-ms", "1500"), ("long", "x" * 300)]
    packed = properties.pack()  # type: ignore[no-untyped-call]  # paho leaves it unannotated
    found = decode_publication(0x30, b"\x00\x01t" + packed + b"body", has_properties=True)
    assert (found.response_topic, found.correlation, found.expiry_s, found.payload) == (REPLIES, b"r1", 300, b"body")
    assert found.words == ((b"deadline-ms", b"1500"), (b"long", b"x" * 300))


def test_a_311_publish_has_no_properties() -> None:
    found = decode_publication(0x32, b"\x00\x01t\x00\x05body", has_properties=False)
    assert (found.topic, found.qos, found.packet_id, found.payload) == (b"t", 1, 5, b"body")


@given(st.binary(max_size=60), st.integers(0x30, 0x3F), st.booleans())
def test_whatever_the_bytes_a_publish_decodes_or_is_refused(content: bytes, header: int, has_properties: bool) -> None:
    with suppress(InvalidRequest):
        decode_publication(header, content, has_properties=has_properties)


@given(st.binary(max_size=300), st.lists(st.tuples(st.text(max_size=20), st.text(max_size=200)), max_size=5))
def test_properties_survive_the_round_trip(correlation: bytes, words: list[tuple[str, str]]) -> None:
    properties = encode_correlation(correlation) + encode_words(words)
    found = decode_publication(0x30, packet(b"t", properties, b"p"), has_properties=True)
    assert found.correlation == correlation
    assert [(key.decode(), value.decode()) for key, value in found.words] == words
    assert found.payload == b"p"


@pytest.mark.parametrize("is_cached", [False, True])
def test_an_answer_says_in_either_form_whether_it_comes_from_the_cache(is_cached: bool) -> None:
    mapping, answer = wire(), replace(ANSWER, is_cached=is_cached)
    # The other one before it: what is remembered of one must not stand in the other's reply.
    mapping.encode_answer(V5, REQUEST, JSON, replace(ANSWER, is_cached=not is_cached), qos=1, deadline_s=9)
    reply = mapping.encode_answer(V5, REQUEST, JSON, answer, qos=1, deadline_s=9)
    assert (encode_words([("cache", "hit")]) in (reply.properties or b"")) is is_cached
    v311 = mapping.encode_answer(V5._replace(is_v5=False), REQUEST, JSON, answer, qos=1, deadline_s=9)
    assert orjson.loads(v311.payload)["parameters"].get("cache") == ("hit" if is_cached else None)


@pytest.mark.parametrize(("measured_j", "said"), [(None, None), (0.00275, "2.750")])
def test_an_answer_says_what_it_took_only_where_that_was_measured(measured_j: float | None, said: str | None) -> None:
    answer = replace(ANSWER, measured_j=measured_j)
    reply = wire().encode_answer(V5, REQUEST, JSON, answer, qos=1, deadline_s=9)
    assert (b"energy-mj" in (reply.properties or b"")) is (said is not None)
    if said is not None:
        assert encode_words([("energy-mj", said)]) in (reply.properties or b"")
    v311 = wire().encode_answer(V5._replace(is_v5=False), REQUEST, JSON, answer, qos=1, deadline_s=9)
    assert orjson.loads(v311.payload)["parameters"].get("energy_mj") == (None if said is None else 2.75)
