"""Where devices are not trusted, a request names its client in its topic, and is answered to no other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import NAME_PATTERN, AgentId, SiteId
from core.open_inference.messages import BodyLimits
from edge_agent.front.mqtt.envelope import Address
from edge_agent.front.mqtt.publication import Publication
from edge_agent.front.mqtt.topics import DropCause, Topics, Undeliverable, template_of
from edge_agent.front.mqtt.wire import Wire

REQUESTS = b"nf/v1/berlin/infer/gate-1/digits"
CAMERA = b"cam-1@berlin"
NAMES = st.from_regex(NAME_PATTERN, fullmatch=True)


def strict() -> Topics:
    return Topics(SiteId("berlin"), AgentId("gate-1"), requires_client=True, shared_by="s3cret")


def address_of(topic: bytes, response_topic: bytes | None, *, topics: Topics | None = None) -> Address:
    wire = Wire(topics or strict(), agent="gate-1", limits=BodyLimits())
    publication = Publication(topic, b"{}", 1, 1, response_topic=response_topic, correlation=b"r1")
    return wire.address_of(publication)


def replies_of(client: bytes) -> bytes:
    return b"nf/v1/berlin/clients/" + client + b"/replies"


def test_only_topics_that_name_a_client_are_subscribed_to() -> None:
    assert strict().filters(is_v5=True) == [
        ("nf/v1/berlin/infer/gate-1/+/+", 1),
        ("nf/v1/berlin/infer/gate-1/+/+/+", 0),
        ("$share/s3cret/nf/v1/berlin/infer/any/+/+", 1),
        ("$share/s3cret/nf/v1/berlin/infer/any/+/+/+", 0),
    ]


def test_a_request_is_answered_to_the_client_in_its_topic() -> None:
    address = address_of(REQUESTS + b"/" + CAMERA, replies_of(CAMERA) + b"/7")

    assert address == ("cam-1@berlin", "digits", (replies_of(CAMERA) + b"/7").decode(), b"r1", True)


def test_a_request_over_311_is_answered_to_the_client_in_its_topic() -> None:
    # The Response Topic, which no access list sees, says nothing here.
    address = address_of(REQUESTS + b"/" + CAMERA + b"/r9", replies_of(b"cam-2@berlin"))

    assert (address.topic, address.is_v5) == ((replies_of(CAMERA) + b"/r9").decode(), False)


@pytest.mark.parametrize("is_strict", [True, False])
def test_a_reply_to_somebody_else_is_refused(is_strict: bool) -> None:
    topics = strict() if is_strict else Topics(SiteId("berlin"), AgentId("gate-1"))
    with pytest.raises(Undeliverable) as caught:
        address_of(REQUESTS + b"/" + CAMERA, replies_of(b"cam-2@berlin"), topics=topics)

    assert caught.value.cause is DropCause.FOREIGN_RESPONSE_TOPIC


@pytest.mark.parametrize("client", [b"", b"/cam-1@paris", b"/cam-1@paris/r1", b"/cam-1@berlin2", b"/cam-1@Berlin"])
def test_a_client_of_nowhere_or_of_another_site_is_refused(client: bytes) -> None:
    with pytest.raises(Undeliverable) as caught:
        address_of(REQUESTS + client, replies_of(CAMERA))

    assert caught.value.cause is DropCause.UNNAMED_CLIENT


def test_a_refused_topic_is_refused_again() -> None:
    topics = strict()
    for _ in range(2):
        with pytest.raises(Undeliverable):
            topics.target_of(REQUESTS)


@given(NAMES, NAMES)
def test_whoever_asks_is_who_is_answered(asking: str, answered: str) -> None:
    try:
        address = address_of(REQUESTS + f"/{asking}@berlin".encode(), replies_of(f"{answered}@berlin".encode()))
    except Undeliverable:
        assert asking != answered
    else:
        assert (asking, address.client) == (answered, f"{asking}@berlin")


@given(st.text(max_size=40))
def test_a_hostile_client_name_is_refused_or_is_one_segment(client: str) -> None:
    try:
        address = address_of(REQUESTS + b"/" + client.encode(errors="replace"), replies_of(client.encode()))
    except (Undeliverable, UnicodeEncodeError):
        return
    assert not set(address.client) & set("+#/$%: ")
    assert address.topic.startswith(f"nf/v1/berlin/clients/{address.client}/replies")


@pytest.mark.parametrize("form", ["", "/{client}", "/{client}/{id}"])
def test_a_span_names_the_form_of_the_topic(form: str) -> None:
    topic = REQUESTS + form.replace("{client}", "cam-1").replace("{id}", "r1").encode()
    assert template_of(topic) == "nf/v1/{site}/infer/{agent}/{model}" + form
