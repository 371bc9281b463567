"""The configuration of deploy/mosquitto on a real broker: each identity reaches its own topics, and nobody else any.

Every certificate is one of a real authority, every request is answered by a real front of an agent.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from edge_agent.client import DeviceClient, Protocol
from edge_agent.front.mqtt.front import MqttFront
from tests.support.edge_front import AGENT, SILENCE_S, TIMEOUT_S, Device, Received, body_of, device, serving
from tests.support.edge_plane import SURE, echo_model
from tests.support.mosquitto import HOST
from tests.support.site_broker import Site, SiteBroker

CAMERA, THIEF = "cam-1", "cam-2"
REQUESTS = "nf/v1/berlin/infer/gate-1/digits"
STATUS = "nf/v1/berlin/agents/gate-1/status"
REQUEST = {"inputs": [{"name": "x", "shape": [1, len(SURE)], "datatype": "FP32", "data": list(SURE)}]}
SECURED = {"host": HOST, "tls": {"enabled": True}, "share_group": "s3cret"}
# CONNECT of MQTT 3.1.1: clean session, 60 s, the client id "x".
CONNECT = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01x"
ACCEPTED = b"\x20\x02\x00\x00"


def replies_of(name: str, site: str = "berlin") -> str:
    return f"nf/v1/berlin/clients/{name}@{site}/replies"


def requests_of(name: str, site: str = "berlin", *, agent: str = "gate-1") -> str:
    return f"nf/v1/berlin/infer/{agent}/digits/{name}@{site}"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = await Site.made(tmp_path)
    yield made
    made.close()


@pytest.fixture
def broker(site: Site) -> Iterator[SiteBroker]:
    with site.running(agents=["gate-1", "gate-2"]) as running:
        yield running


@pytest.fixture
async def front(site: Site, broker: SiteBroker) -> AsyncIterator[MqttFront]:
    async with serving(broker, echo_model(), settings=SECURED, tls=await site.agent(AGENT)) as serves:
        yield serves


async def heard(listener: Device, *, silence_s: float = SILENCE_S) -> list[Received]:
    """Return what comes until nothing comes any more."""
    messages = []
    with suppress(TimeoutError):
        while True:
            messages.append(await listener.reply(timeout_s=silence_s))
    return messages


async def answered(camera: Device, name: str = CAMERA, **more: Any) -> Received:
    camera.send(body_of(), topic=requests_of(name), response_topic=replies_of(name), **more)
    return await camera.reply()


async def received(front: MqttFront, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while front.counters.received < count:
            await asyncio.sleep(0.01)


# ---- what must work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "agent"), [(Protocol.MQTT_5, "gate-1"), (Protocol.MQTT_5, "any"), (Protocol.MQTT_311, "gate-1")]
)
async def test_a_device_is_answered(
    site: Site, broker: SiteBroker, front: MqttFront, protocol: Protocol, agent: str
) -> None:
    def ask() -> list[int]:
        address = (broker.host, broker.port)
        with DeviceClient(CAMERA, site="berlin", broker=address, protocol=protocol, tls=site.device(CAMERA)) as camera:
            return [camera.ask("digits", REQUEST, agent=agent).status for _ in range(20)]

    assert await asyncio.to_thread(ask) == [200] * 20
    assert front.counters.replied == 20


@pytest.mark.parametrize("protocol", Protocol)
async def test_a_device_finds_and_probes_the_nearest_agent(
    site: Site, broker: SiteBroker, front: MqttFront, protocol: Protocol
) -> None:
    def ask() -> str:
        address = (broker.host, broker.port)
        with DeviceClient(CAMERA, site="berlin", broker=address, protocol=protocol, tls=site.device(CAMERA)) as camera:
            give_up_s = time.monotonic() + TIMEOUT_S
            while not front.counters.probes:
                assert time.monotonic() < give_up_s
                time.sleep(0.02)
            return camera.ask("digits", REQUEST).agent

    assert await asyncio.to_thread(ask) == "gate-1"


async def test_an_agent_that_speaks_311_answers_too(site: Site, broker: SiteBroker) -> None:
    settings = {**SECURED, "protocol": 4}
    async with (
        serving(broker, echo_model(), settings=settings, tls=await site.agent(AGENT)),
        device(broker, topic=replies_of(CAMERA) + "/+", is_v5=False, tls=site.device(CAMERA)) as camera,
    ):
        camera.send(body_of(), topic=requests_of(CAMERA) + "/r1")
        assert (await camera.reply()).topic == replies_of(CAMERA) + "/r1"


async def test_requests_and_replies_of_many_records_come_through(
    site: Site, broker: SiteBroker, front: MqttFront
) -> None:
    """A TLS record holds 16 KiB, and what OpenSSL holds back wakes no loop."""
    async with device(broker, topic=replies_of(CAMERA), tls=site.device(CAMERA)) as camera:
        for number in range(12):
            camera.send(
                body_of() + b" " * (number * 300_000 + 16_000),
                topic=requests_of(CAMERA),
                response_topic=replies_of(CAMERA),
                correlation=b"%d" % number,
            )
        replies = [await camera.reply() for _ in range(12)]

    assert {(reply.correlation, reply.words["status"]) for reply in replies} == {
        (b"%d" % number, "200") for number in range(12)
    }


async def test_a_device_sees_what_agents_of_its_site_say_of_themselves(
    site: Site, broker: SiteBroker, front: MqttFront
) -> None:
    async with device(broker, topic="nf/v1/berlin/agents/+/status", tls=site.device(CAMERA)) as camera:
        status = await camera.reply()

    assert (status.topic, status.body["state"]) == (STATUS, "online")


# ---- what others must not read --------------------------------------------------------------------------------

EVERYTHING = [
    "#",
    "nf/#",
    "+/+/+/+/+/+/#",
    replies_of(CAMERA),
    replies_of(CAMERA) + "/#",
    "nf/v1/berlin/clients/#",
    "nf/v1/berlin/clients/+/replies",
    "nf/v1/berlin/infer/#",
    requests_of(CAMERA),
    "nf/v1/berlin/infer/+/digits/+/+",
    "nf/v1/berlin/infer/any/#",
    "$share/nf/nf/v1/berlin/clients/+/replies/#",
    "$share/x/#",
    "$share/nf/nf/v1/berlin/infer/any/+/+",
    "$share/s3cret/nf/v1/berlin/clients/#",
    "$SYS/#",
    "$SYS/broker/log/#",
    "$CONTROL/#",
]


async def test_no_filter_shows_a_device_requests_or_replies_of_another(
    site: Site, broker: SiteBroker, front: MqttFront
) -> None:
    async with AsyncExitStack() as stack:
        thieves = {}
        for number, topic in enumerate(EVERYTHING):
            listening = device(broker, topic=topic, tls=site.device(f"thief-{number}"))
            thieves[topic] = await stack.enter_async_context(listening)
        camera = await stack.enter_async_context(device(broker, topic=replies_of(CAMERA), tls=site.device(CAMERA)))
        assert (await answered(camera)).words["status"] == "200"
        camera.send(body_of(), topic=requests_of(CAMERA) + "/r1")
        camera.send(body_of(), topic=requests_of(CAMERA, agent="any"), response_topic=replies_of(CAMERA))
        await received(front, 3)
        stolen = {topic: await heard(thief, silence_s=0.05) for topic, thief in thieves.items()}

    topics = {topic: {message.topic for message in messages} - {STATUS} for topic, messages in stolen.items()}
    assert topics == {topic: set() for topic in EVERYTHING}


async def test_the_same_filter_shows_a_device_its_own_replies(site: Site, broker: SiteBroker, front: MqttFront) -> None:
    """Else the tests above would pass at a broker that delivers nothing."""
    async with device(broker, topic="#", tls=site.device(THIEF)) as thief:
        thief.send(body_of(), topic=requests_of(THIEF), response_topic=replies_of(THIEF))
        topics = {message.topic for message in await heard(thief)}

    assert topics == {STATUS, replies_of(THIEF)}


async def test_an_agent_reads_no_requests_of_another_and_no_replies(
    site: Site, broker: SiteBroker, front: MqttFront
) -> None:
    spying = await (await site.agent("gate-2")).context()
    async with (
        device(broker, topic="#", tls=spying) as spy,
        device(broker, topic=replies_of(CAMERA), tls=site.device(CAMERA)) as camera,
    ):
        await answered(camera)
        assert {message.topic for message in await heard(spy)} == {STATUS}


async def test_a_device_of_another_site_is_another_client(site: Site, broker: SiteBroker, front: MqttFront) -> None:
    async with (
        device(broker, topic="nf/v1/berlin/clients/#", tls=site.device(CAMERA, site="paris")) as foreigner,
        device(broker, topic=replies_of(CAMERA), tls=site.device(CAMERA)) as camera,
    ):
        await answered(camera)
        foreigner.send(body_of(), topic=requests_of(CAMERA), response_topic=replies_of(CAMERA))
        own = replies_of(CAMERA, "paris")
        foreigner.send(body_of(), topic=requests_of(CAMERA, "paris"), response_topic=own)
        await received(front, 2)
        assert await heard(foreigner) == []
        assert await camera.hears_nothing()

    assert (front.counters.unnamed_client, front.counters.replied) == (1, 1)


# ---- what others must not write -------------------------------------------------------------------------------


FORGED = [
    requests_of(CAMERA),
    requests_of(CAMERA) + "/r1",
    requests_of(CAMERA, agent="any"),
    REQUESTS,
    "nf/v1/berlin/infer/any/digits",
    REQUESTS + f"/r1/{THIEF}@berlin",
    REQUESTS + f"/{THIEF}@berlin/{CAMERA}@berlin/r1",
    REQUESTS + "/agent:gate-1",
    REQUESTS + f"/{THIEF}",
    replies_of(CAMERA),
    replies_of(CAMERA) + "/r1",
    STATUS,
]


@pytest.mark.parametrize("is_v5", [True, False])
async def test_a_device_publishes_in_no_name_but_its_own(
    site: Site, broker: SiteBroker, front: MqttFront, is_v5: bool
) -> None:
    async with (
        device(broker, topic=replies_of(CAMERA) + "/#", tls=site.device(CAMERA)) as camera,
        device(broker, topic=replies_of(THIEF), is_v5=is_v5, tls=site.device(THIEF)) as thief,
    ):
        for topic in FORGED:
            thief.send(b'{"state": "forged"}', topic=topic, qos=1, retain=True, response_topic=replies_of(CAMERA))
        # Its own request, sent afterwards, arrives; so the broker has dealt with the forged ones.
        thief.send(body_of(), topic=requests_of(THIEF) + "/r2", qos=0)
        await received(front, 1)
        assert front.counters.received == 1
        assert await camera.hears_nothing()
        async with device(broker, topic=STATUS, tls=site.device("cam-3")) as watcher:
            assert [message.body["state"] for message in await heard(watcher)] == ["online"]


async def test_a_reply_to_another_client_cannot_be_asked_for(site: Site, broker: SiteBroker, front: MqttFront) -> None:
    """The Response Topic is not seen by the access list; the agent refuses it."""
    async with (
        device(broker, topic=replies_of(CAMERA) + "/#", tls=site.device(CAMERA)) as camera,
        device(broker, topic=replies_of(THIEF), tls=site.device(THIEF)) as thief,
    ):
        thief.send(body_of(), topic=requests_of(THIEF), response_topic=replies_of(CAMERA))
        thief.send(body_of(), topic=requests_of(THIEF), response_topic=replies_of(CAMERA) + "/r1", correlation=b"r2")
        await received(front, 2)
        assert await camera.hears_nothing()

    assert (front.counters.foreign_response_topic, front.counters.replied) == (2, 0)


async def test_an_agent_says_nothing_in_the_name_of_another(site: Site, broker: SiteBroker, front: MqttFront) -> None:
    lying = await (await site.agent("gate-2")).context()
    async with device(broker, topic="nf/v1/berlin/agents/gate-2/status", tls=lying) as liar:
        liar.send(b'{"state": "forged"}', topic=STATUS, retain=True)
        liar.send(b'{"state": "own"}', topic="nf/v1/berlin/agents/gate-2/status", retain=True)
        assert (await liar.reply()).body["state"] == "own"
        async with device(broker, topic=STATUS, tls=site.device(CAMERA)) as watcher:
            assert [message.body["state"] for message in await heard(watcher)] == ["online"]


async def test_a_will_is_bound_by_the_access_list_too(site: Site, broker: SiteBroker, front: MqttFront) -> None:
    will = b"\x00" + bytes([len(STATUS)]) + STATUS.encode() + b"\x00\x06forged"
    packet = b"\x00\x04MQTT\x04\x26\x00\x3c\x00\x01x" + will
    with opened(broker, site.device(THIEF)) as thief:
        thief.sendall(b"\x10" + bytes([len(packet)]) + packet)
        # Gone without a goodbye, so that the Will is due, if it was taken.
        thief.recv(4)
    async with device(broker, topic=STATUS, tls=site.device(CAMERA)) as watcher:
        assert [message.body["state"] for message in await heard(watcher)] == ["online"]


@pytest.mark.parametrize("client_id", ["nf-agent-gate-1", "agent:gate-1", f"{CAMERA}@berlin"])
async def test_nobody_takes_over_a_session_by_its_client_id(
    site: Site, broker: SiteBroker, front: MqttFront, client_id: str
) -> None:
    async with (
        device(broker, topic=replies_of(CAMERA), tls=site.device(CAMERA)) as camera,
        device(broker, topic="#", tls=site.device(THIEF), client_id=client_id) as thief,
    ):
        assert (await answered(camera)).words["status"] == "200"
        assert {message.topic for message in await heard(thief)} <= {STATUS}

    assert front.last_error is None


async def test_who_does_not_know_the_agents_group_takes_no_requests_to_any(
    site: Site, broker: SiteBroker, front: MqttFront
) -> None:
    async with (
        device(broker, topic="$share/nf/nf/v1/berlin/infer/any/+/+", tls=site.device(THIEF)),
        device(broker, topic=replies_of(CAMERA), tls=site.device(CAMERA)) as camera,
    ):
        for number in range(10):
            topic = requests_of(CAMERA, agent="any")
            camera.send(body_of(), topic=topic, response_topic=replies_of(CAMERA), correlation=b"%d" % number)
        assert len([await camera.reply() for _ in range(10)]) == 10


# ---- who gets nothing at all ----------------------------------------------------------------------------------


def opened(broker: SiteBroker, context: ssl.SSLContext | None) -> socket.socket:
    plain = socket.create_connection((broker.host, broker.port), timeout=5)
    return plain if context is None else context.wrap_socket(plain, server_hostname=broker.host)


def welcome(broker: SiteBroker, context: ssl.SSLContext | None) -> bool:
    """Say whether the broker accepts a client."""
    try:
        with opened(broker, context) as client:
            client.sendall(CONNECT)
            return client.recv(4) == ACCEPTED
    except OSError:
        return False


STRANGERS = ["plain", "without a certificate", "of another fleet", "expired", "an application", "a server", "unnamed"]


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_gets_nothing(site: Site, broker: SiteBroker, stranger: str) -> None:
    contexts: dict[str, Callable[[], ssl.SSLContext | None]] = {
        "plain": lambda: None,
        "without a certificate": site.nobody,
        "of another fleet": lambda: site.of_another_fleet("cam-1@berlin"),
        "expired": lambda: site.forged("cam-1@berlin", life=timedelta(seconds=-1)),
        "an application": lambda: site.application("shop"),
        "a server": site.broker_as_client,
        "unnamed": lambda: site.forged(""),
    }
    assert welcome(broker, site.device(CAMERA))

    assert not welcome(broker, contexts[stranger]())
