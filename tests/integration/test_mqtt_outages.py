"""The broker or the agent goes away and comes back: nothing accepted is lost, nothing is answered late."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.deadline import Deadline
from core.open_inference.messages import InferRequest, InferResponse
from edge_agent.front.mqtt.broker import BrokerState
from tests.support.edge_front import AGENT, SITE, TIMEOUT_S, body_of, device, serving, until
from tests.support.edge_models import make_mlp
from tests.support.edge_plane import UNSURE, FakeHeavy, SlowModel, cascade_of, echo_model
from tests.support.mosquitto import Mosquitto, running_mosquitto
from tests.support.offline_agent import offline_agent


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path) as running:
        yield running


async def test_requests_wait_in_the_broker_while_the_agent_is_away(broker: Mosquitto) -> None:
    async with device(broker) as camera:
        async with serving(broker, echo_model()):
            pass
        for number in range(3):
            camera.send(body_of(), correlation=b"%d" % number, expiry_s=60)
        assert await camera.hears_nothing()
        async with serving(broker, echo_model()):
            replies = [await camera.reply() for _ in range(3)]
    assert [reply.correlation for reply in replies] == [b"0", b"1", b"2"]


async def test_what_a_broker_with_a_disk_has_taken_survives_its_restart(tmp_path: Path) -> None:
    with running_mosquitto(tmp_path, persistent=True) as broker:
        async with serving(broker, echo_model()):
            pass
        async with device(broker) as camera:
            camera.send(body_of(), expiry_s=60)
            assert await camera.hears_nothing()
        await asyncio.to_thread(broker.stop)
        await asyncio.to_thread(broker.start)
        async with device(broker) as camera, serving(broker, echo_model()):
            assert (await camera.reply()).words["status"] == "200"


async def test_a_request_that_expired_while_the_agent_was_away_is_not_answered(broker: Mosquitto) -> None:
    async with device(broker) as camera:
        async with serving(broker, echo_model()):
            pass
        # The broker would still deliver it; by the device's own, finer deadline it is over.
        camera.send(body_of(), expiry_s=3, deadline_ms="2100")
        await asyncio.sleep(2.2)
        async with serving(broker, echo_model()) as front:
            assert await camera.hears_nothing()
            assert front.counters.replied == 0


@pytest.mark.parametrize("has_finer_deadline", [False, True])
async def test_no_request_that_waited_is_answered_after_its_deadline(
    broker: Mosquitto, has_finer_deadline: bool
) -> None:
    async with device(broker) as camera:
        async with serving(broker, echo_model()):
            pass
        sent_s: dict[bytes, float] = {}
        # The broker counts whole seconds, and one more is taken off all that waited: of three, the newest keep one.
        for number in range(16):
            sent_s[b"%d" % number] = time.monotonic()
            if has_finer_deadline:
                camera.send(body_of(), correlation=b"%d" % number, expiry_s=3, deadline_ms="3000")
            else:
                camera.send(body_of(), correlation=b"%d" % number, expiry_s=3)
            await asyncio.sleep(0.25)
        async with serving(broker, echo_model()):
            started_s = time.monotonic()
            answered = []
            while time.monotonic() < started_s + 1.0:
                try:
                    answered.append((await camera.reply(timeout_s=0.2)).correlation)
                except TimeoutError:
                    continue
    assert answered
    assert all(started_s - sent_s[correlation] < 3.0 for correlation in answered)


async def test_with_the_broker_away_the_agent_says_so_and_comes_back_by_itself(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()) as front:
        await asyncio.to_thread(broker.kill)
        await until(front, BrokerState.WAITING)
        assert str(broker.port) in (front.last_error or "")
        await asyncio.to_thread(broker.start)
        await until(front, BrokerState.ONLINE)
        assert not front.last_error
        async with device(broker) as camera:
            camera.send(body_of())
            assert (await camera.reply()).words["status"] == "200"


async def test_an_answer_that_is_ready_while_the_broker_is_away_is_sent_when_it_is_back(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded()) as front, device(broker) as camera:
        camera.send(body_of(), expiry_s=60, deadline_ms="60000")
        await model.is_running.wait()
        await asyncio.to_thread(broker.kill)
        await until(front, BrokerState.WAITING)
        model.release()
        async with asyncio.timeout(TIMEOUT_S):
            while front.in_flight:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(broker.start)
        # The device's own client subscribes again only after a second or more; QoS 1 does not reach it before that.
        assert front.counters.late == 0
        await until(front, BrokerState.ONLINE)
        assert front.counters.replied == 1


async def test_an_agent_that_stops_finishes_what_it_has_and_refuses_the_rest(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded()) as front, device(broker) as camera:
        camera.send(body_of(), correlation=b"accepted")
        await model.is_running.wait()
        draining = asyncio.create_task(front.drain())
        await asyncio.sleep(0)
        camera.send(body_of(), correlation=b"refused")
        refused = await camera.reply()
        assert (refused.correlation, refused.words["status"]) == (b"refused", "503")
        model.release()
        assert (await camera.reply()).correlation == b"accepted"
        await draining


class HeldHeavy(FakeHeavy):
    """A heavy tier that answers all its requests at once, at `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.release = asyncio.Event()

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse:
        await self.release.wait()
        return await super().ask(request, deadline=deadline, traceparent=traceparent)


async def test_a_stop_loses_no_reply_that_waits_for_the_broker_to_take_more(broker: Mosquitto) -> None:
    """Mosquitto takes 20 QoS 1 messages ahead of their acknowledgement; 64 answers become ready at once."""
    status = f"nf/v1/{SITE}/agents/{AGENT}/status"
    heavy = HeldHeavy()
    async with device(broker) as camera:
        async with serving(broker, echo_model(cascade=cascade_of()), heavy=heavy) as front:
            for number in range(64):
                camera.send(body_of(UNSURE), correlation=b"%d" % number, expiry_s=60)
            async with asyncio.timeout(TIMEOUT_S):
                while front.in_flight < 64:
                    await asyncio.sleep(0.01)
            heavy.release.set()
            await front.drain()
        replies = [await camera.reply() for _ in range(64)]
    assert {reply.correlation for reply in replies} == {b"%d" % number for number in range(64)}
    async with device(broker, topic=status) as watcher:
        assert (await watcher.reply()).body["state"] == "offline"


async def test_the_broker_tells_the_others_when_an_agent_dies(broker: Mosquitto, tmp_path: Path) -> None:
    status = f"nf/v1/{SITE}/agents/{AGENT}/status"
    models = [make_mlp(tmp_path / "model")]
    with offline_agent(tmp_path / "agent", models=models, broker=broker, agent_id=AGENT, site=SITE) as agent:
        async with device(broker, topic=status) as watcher:
            born = (await watcher.reply()).body
            assert born["state"] == "online"
            agent.process.kill()
            gone = (await watcher.reply()).body
    assert (gone["state"], gone["epoch"]) == ("offline", born["epoch"])
