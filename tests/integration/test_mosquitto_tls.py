"""The broker of deploy/mosquitto over time: restarts, renewals, bans, wrong servers, hostile names; a whole agent."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from edge_agent.client import DeviceClient, NoReply
from edge_agent.front.mqtt.broker import BrokerState
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.health.state_folder import StateFolder
from tests.support.edge_front import AGENT, SILENCE_S, TIMEOUT_S, Device, body_of, device, serving, until
from tests.support.edge_models import make_mlp
from tests.support.edge_plane import echo_model
from tests.support.mosquitto import HOST, program_path
from tests.support.offline_agent import offline_agent
from tests.support.site_broker import Site, SiteBroker, render

SECURED = {"host": HOST, "tls": {"enabled": True}}
CAMERA = "cam-1"
REQUESTS = f"nf/v1/berlin/infer/gate-1/digits/{CAMERA}@berlin"
REPLIES = f"nf/v1/berlin/clients/{CAMERA}@berlin/replies"
REQUEST = {"inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}]}
STATUS = "nf/v1/berlin/agents/gate-1/status"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = await Site.made(tmp_path)
    yield made
    made.close()


async def answered(camera: Device) -> str:
    camera.send(body_of(), topic=REQUESTS, response_topic=REPLIES)
    return (await camera.reply()).words["status"]


def camera_at(site: Site, broker: SiteBroker) -> Any:
    return device(broker, topic=REPLIES, tls=site.device(CAMERA))


async def complains(front: MqttFront, words: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while words not in (front.last_error or ""):
            await asyncio.sleep(0.01)


@pytest.fixture
async def broker(site: Site) -> AsyncIterator[SiteBroker]:
    with site.running() as running:
        yield running


# ---- over time ------------------------------------------------------------------------------------------------


async def test_an_agent_comes_back_when_the_broker_was_away(site: Site, broker: SiteBroker) -> None:
    async with serving(broker, echo_model(), settings=SECURED, tls=await site.agent(AGENT)) as front:
        await asyncio.to_thread(broker.kill)
        await until(front, BrokerState.WAITING)
        await asyncio.to_thread(broker.start)
        await until(front, BrokerState.ONLINE)
        async with camera_at(site, broker) as camera:
            assert await answered(camera) == "200"


async def test_requests_wait_in_the_broker_while_the_agent_is_away(site: Site, broker: SiteBroker) -> None:
    agent = await site.agent(AGENT)
    async with camera_at(site, broker) as camera:
        async with serving(broker, echo_model(), settings=SECURED, tls=agent):
            pass
        camera.send(body_of(), topic=REQUESTS, response_topic=REPLIES, expiry_s=60)
        assert await camera.hears_nothing()
        async with serving(broker, echo_model(), settings=SECURED, tls=agent):
            assert (await camera.reply()).words["status"] == "200"


async def test_a_renewed_certificate_and_a_new_authority_count_from_the_next_connection_on(
    site: Site, broker: SiteBroker
) -> None:
    async with serving(broker, echo_model(), settings=SECURED, tls=await site.agent(AGENT)) as front:
        # The agent's folder as a renewal leaves it, while the connection stands.
        await site.replace_authority()
        site.certify_broker()
        await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(broker.start)
        await complains(front, "certificate")
        await site.agent_folder(AGENT)
        await until(front, BrokerState.ONLINE)
        async with camera_at(site, broker) as camera:
            assert await answered(camera) == "200"


async def test_a_banned_device_is_shut_out_when_the_list_is_read_again(site: Site, broker: SiteBroker) -> None:
    async with (
        serving(broker, echo_model(), settings=SECURED, tls=await site.agent(AGENT)) as front,
        camera_at(site, broker) as camera,
    ):
        assert await answered(camera) == "200"
        broker.ban(CAMERA)
        async with asyncio.timeout(TIMEOUT_S):
            while front.counters.received:
                front.counters.received = 0
                camera.send(body_of(), topic=REQUESTS, response_topic=REPLIES, correlation=b"r2")
                await asyncio.sleep(SILENCE_S)


# ---- servers that are not the broker --------------------------------------------------------------------------


@pytest.mark.parametrize("server_name", ["broker.example", "127.0.0.2"])
async def test_an_agent_believes_no_broker_of_another_name(site: Site, broker: SiteBroker, server_name: str) -> None:
    agent = await site.agent(AGENT, server_name=server_name)
    async with serving(broker, settings=SECURED, tls=agent, expected=BrokerState.WAITING) as front:
        await complains(front, "certificate verify failed")


async def test_an_agent_believes_no_broker_of_another_fleet(site: Site, broker: SiteBroker, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = await Site.made(tmp_path / "other")
    agent = await other.agent(AGENT)
    async with serving(broker, settings=SECURED, tls=agent, expected=BrokerState.WAITING) as front:
        await complains(front, "certificate verify failed")
    other.close()


async def test_an_agent_whose_certificate_is_refused_says_so(site: Site, broker: SiteBroker, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = await Site.made(tmp_path / "other")
    agent = await other.agent(AGENT, ca_file=tmp_path / "broker" / "trust.pem")
    async with serving(broker, settings=SECURED, tls=agent, expected=BrokerState.WAITING) as front:
        await complains(front, "TLS: ")
    other.close()


async def test_an_agent_that_is_not_in_the_list_answers_nobody(site: Site, broker: SiteBroker) -> None:
    async with (
        serving(broker, echo_model(), settings=SECURED, tls=await site.agent("gate-9"), agent="gate-9") as front,
        camera_at(site, broker) as camera,
    ):
        camera.send(body_of(), topic=REQUESTS.replace("gate-1", "gate-9"), response_topic=REPLIES)
        assert await camera.hears_nothing()

    assert front.counters.received == 0


async def test_a_device_is_told_why_it_does_not_reach_its_broker(site: Site, broker: SiteBroker) -> None:
    camera = DeviceClient(CAMERA, site="berlin", broker=(HOST, broker.port), tls=site.nobody())
    with pytest.raises(NoReply, match=f"broker {HOST}:{broker.port}"):
        await asyncio.to_thread(camera.connect, timeout_s=0.5)


# ---- names ----------------------------------------------------------------------------------------------------

HOSTILE = [
    "#",
    "+",
    "+/+",
    "+@berlin",
    "%u",
    "%c",
    "$share",
    f"{CAMERA}@berlin/replies",
    f"../{CAMERA}@berlin",
    f"x/clients/{CAMERA}@berlin",
    f"{CAMERA}@berlin\x00",
    f"{CAMERA}@berlin ",
    f"{CAMERA}@berlin\n",
    CAMERA,
    f"{CAMERA.upper()}@berlin",
    f"{CAMERA}@BERLIN",
    f"{CAMERA}@berli",
    f"{CAMERA}@berlin2",
    "agent:gate-10",
    "agent:gate",
    "Agent:gate-1",
    "agent:gate-1/x",
    "agent:gate-1 ",
    "agent:any",
    "agent:+",
    "agent",
    "user",
    "x" * 64,
    "ä\u202e",
]


async def test_a_hostile_name_gives_no_right_even_if_it_were_certified(site: Site, broker: SiteBroker) -> None:
    """The authority certifies none of them; the list does not rest on that alone."""
    async with (
        serving(broker, echo_model(), settings=SECURED, tls=await site.agent(AGENT)) as front,
        camera_at(site, broker) as camera,
    ):
        stolen = {}
        for index, name in enumerate(HOSTILE):
            async with AsyncExitStack() as stack:
                thief = await entered(stack, device(broker, topic="#", tls=site.forged(name)))
                for topic in (REQUESTS, REPLIES, STATUS, REQUESTS + "/r1"):
                    if thief is not None:
                        thief.send(b"forged", topic=topic, response_topic=REPLIES, retain=True, qos=0)
                camera.send(body_of(), topic=REQUESTS, response_topic=REPLIES, correlation=b"%d" % index)
                assert (await camera.reply()).words["status"] == "200"
                stolen[name] = set() if thief is None else await topics_of(thief)

    assert {name: topics for name, topics in stolen.items() if topics - {STATUS}} == {}
    assert front.counters.received == front.counters.replied == len(HOSTILE)


async def entered(stack: AsyncExitStack, connecting: AbstractAsyncContextManager[Device]) -> Device | None:
    """Return a device that is connected; None when the broker refuses it altogether."""
    try:
        async with asyncio.timeout(1.0):
            return await stack.enter_async_context(connecting)
    except TimeoutError:
        return None


async def topics_of(listener: Device) -> set[str]:
    topics = set()
    while True:
        try:
            topics.add((await listener.reply(timeout_s=0.05)).topic)
        except TimeoutError:
            return topics


@pytest.mark.parametrize(
    "words",
    [
        ("--site", "a/b"),
        ("--site", "+"),
        ("--site", ""),
        ("--site", "a\nb"),
        ("--site", "a|b"),
        ("--site", "a&b"),
        ("--site", "x" * 65),
        ("--site", "berlin", "--agent", "any"),
        ("--site", "berlin", "--agent", "#"),
        ("--site", "berlin", "--agent", "a b"),
        ("--site", "berlin", "--ban", "a\nuser agent:gate-1"),
        ("--site", "berlin", "--listen", "1883\nallow_anonymous true"),
        ("--site", "berlin", "--folder", "/x|y"),
        ("--site",),
        ("--agent", "gate-1"),
        ("--colour", "red"),
    ],
)
def test_a_list_is_not_written_for_names_that_are_none(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        render(tmp_path, *words)

    assert list(tmp_path.iterdir()) == []


# ---- a whole agent --------------------------------------------------------------------------------------------


async def test_an_agent_process_answers_its_device_over_tls_and_is_missed_when_it_dies(
    site: Site, broker: SiteBroker, tmp_path: Path
) -> None:
    state, models = tmp_path / "agent", [make_mlp(tmp_path / "model")]
    await site.agent_folder(AGENT, path=StateFolder(state).identity)
    environment = {"MQTT__TLS__ENABLED": "true", "MQTT__HOST": "localhost"}

    def ask() -> int:
        address = ("localhost", broker.port)
        with DeviceClient(CAMERA, site="berlin", broker=address, tls=site.device(CAMERA)) as camera:
            return camera.ask(models[0].manifest.model, REQUEST, agent="any").status

    with offline_agent(state, models=models, broker=broker, environment=environment, is_enrolled=True) as agent:
        assert await asyncio.to_thread(ask) == 200
        async with device(broker, topic=STATUS, tls=site.device("cam-2")) as watcher:
            assert (await watcher.reply()).body["state"] == "online"
            agent.process.kill()
            assert (await watcher.reply()).body["state"] == "offline"


async def test_a_stock_client_is_answered_as_the_guide_says(site: Site, broker: SiteBroker) -> None:
    folder = site.device_folder(CAMERA)
    command = [
        *(program_path("mosquitto_rr"), "-V", "5", "-h", broker.host, "-p", str(broker.port), "-W", "10"),
        *("--cafile", str(folder / "trust.pem"), "--cert", str(folder / "identity.pem")),
        *("--key", str(folder / "identity.pem"), "-t", REQUESTS, "-e", REPLIES, "-D", "publish", "correlation-data"),
        *("1", "-D", "publish", "message-expiry-interval", "5", "-D", "publish", "content-type", "application/json"),
        *("-m", body_of().decode()),
    ]
    async with serving(broker, echo_model(), settings=SECURED, tls=await site.agent(AGENT)):
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        output, _ = await process.communicate()

    assert b'"outputs"' in output


async def test_an_agent_on_a_plain_listener_of_its_machine_serves_devices_with_certificates(
    site: Site, broker: SiteBroker
) -> None:
    """As the comment in nanofleet.conf says; the agent must be told not to trust topics without a client."""
    broker.kill()
    plain_port = broker.add_plain_listener()
    broker.start()
    settings = {"port": plain_port, "require_client_topic": True}
    async with camera_at(site, broker) as camera:
        async with serving(broker, echo_model(), settings=settings) as front:
            camera.send(body_of(), topic="nf/v1/berlin/infer/gate-1/digits", response_topic=REPLIES)
            assert await answered(camera) == "200"
            assert front.counters.received == 1
        camera.send(body_of(), topic=REQUESTS, response_topic=REPLIES, correlation=b"r2", expiry_s=60)
        async with serving(broker, echo_model(), settings=settings):
            assert (await camera.reply()).correlation == b"r2"
