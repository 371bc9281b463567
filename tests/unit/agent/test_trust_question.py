"""What gate and child say to each other, and what a peer can send into it: nothing but errors of ours come out."""

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.addresses import Address
from core.digest import digest_of
from core.errors import (
    DiskFull,
    Forbidden,
    InternalError,
    InvalidName,
    InvalidRequest,
    NanofleetError,
    Unavailable,
    Untrusted,
)
from core.fleet_state import MetadataFile, SignedAssignment
from core.fleet_wire import decode_assignment, encode_assignment
from core.grpc_transport import TlsIdentity
from core.ids import AgentId
from edge_agent.trust.gate import decoded
from edge_agent.trust.question import (
    MAX_QUESTION_BYTES,
    Answer,
    CatalogueSource,
    Question,
    Statement,
    decode_answer,
    decode_question,
    encode_answer,
    encode_question,
    encode_refusal,
)
from edge_agent.trust.verifier import decoded_assignment
from protos.fleet.v1 import fleet_pb2 as pb

AGENT = AgentId("gate-1")
SOURCE = CatalogueSource(Address("127.0.0.1", 7443), TlsIdentity(b"chain", b"key", b"bundle"))

names = st.text(max_size=40)
assignments = st.builds(
    SignedAssignment,
    st.binary(max_size=200),
    st.binary(max_size=80),
    names,
    st.lists(st.builds(MetadataFile, names, st.binary(max_size=60)), max_size=4).map(tuple),
)
questions = st.builds(
    Question,
    st.just(Path("/var/lib/nanofleet/trust")),
    st.just(AGENT),
    assignments,
    st.frozensets(st.binary(max_size=8).map(digest_of), max_size=3),
    st.sampled_from([None, SOURCE]),
)
answers = st.builds(
    Answer,
    st.dictionaries(
        st.binary(max_size=8).map(digest_of),
        st.builds(Statement, st.integers(1, 1 << 22), st.integers(0, 1 << 31)),
        max_size=4,
    ),
    st.floats(0, 1e12),
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(questions)
def test_a_question_arrives_as_it_was_asked(question: Question) -> None:
    assert decode_question(encode_question(question)) == question


@given(answers)
def test_an_answer_arrives_as_it_was_given(answer: Answer) -> None:
    assert decode_answer(encode_answer(answer)) == answer


@pytest.mark.parametrize("error", [Untrusted("a"), Unavailable("b"), DiskFull("c"), InvalidRequest("d")])
def test_a_refusal_arrives_as_the_error_that_it_was(error: NanofleetError) -> None:
    with pytest.raises(type(error), match=str(error)):
        decode_answer(encode_refusal(error))


def test_a_narrower_refusal_arrives_as_the_wider_one_and_any_other_as_a_defect() -> None:
    with pytest.raises(InvalidRequest):
        decode_answer(encode_refusal(InvalidName("a")))
    with pytest.raises(InternalError):
        decode_answer(encode_refusal(Forbidden("b")))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_question_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_question(content)


@given(questions, st.data())
def test_a_question_with_anything_else_in_a_field_is_refused_or_is_a_question(
    question: Question, data: st.DataObject
) -> None:
    fields = orjson.loads(encode_question(question))
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(documents)
    try:
        decode_question(orjson.dumps(fields))
    except InvalidRequest:
        return


@given(st.binary(max_size=100) | documents.map(orjson.dumps))
def test_bytes_that_are_no_answer_are_a_defect(content: bytes) -> None:
    try:
        decode_answer(content)
    except InternalError:
        return


def test_a_question_beyond_its_bound_is_not_parsed() -> None:
    with pytest.raises(InvalidRequest, match="expected at most"):
        decode_question(b" " * (MAX_QUESTION_BYTES + 1))


@given(assignments)
def test_an_assignment_arrives_as_it_was_sent(signed: SignedAssignment) -> None:
    sent = encode_assignment(signed).SerializeToString()
    assert decode_assignment(pb.SignedAssignment.FromString(sent)) == signed


@given(st.binary(max_size=300))
def test_a_payload_of_any_bytes_is_a_desired_state_or_an_error_of_ours(payload: bytes) -> None:
    signed = SignedAssignment(payload, b"", "")
    for decode in (decoded, lambda given: decoded_assignment(given, agent_id=AGENT)):
        try:
            decode(signed)
        except NanofleetError:
            continue


@given(
    st.builds(
        pb.DesiredState,
        agent_id=names,
        position=st.builds(pb.Position, epoch=st.integers(0, (1 << 64) - 1)),
        slots=st.lists(
            st.builds(pb.Slot, model=names, version=st.integers(-5, 5), variant=names, manifest_digest=names),
            max_size=3,
        ),
    )
)
def test_a_desired_state_of_any_content_is_one_or_an_error_of_ours(message: pb.DesiredState) -> None:
    try:
        decoded(SignedAssignment(message.SerializeToString(), b"", ""))
    except NanofleetError:
        return
