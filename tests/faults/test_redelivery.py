"""Requests that come again: one execution, one answer, whatever QoS and protocol; other content is told apart."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.edge_front import CLIENT, REPLIES, REQUESTS, body_of, device, serving
from tests.support.edge_plane import UNSURE, FakeHeavy, SlowModel, cascade_of, echo_model
from tests.support.mosquitto import Mosquitto, running_mosquitto


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_request_that_a_device_sends_again_runs_once_and_gets_the_same_reply(
    broker: Mosquitto, qos: int
) -> None:
    heavy = FakeHeavy()
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=heavy) as front, device(broker) as camera:
        replies = []
        for _ in range(3):
            camera.send(body_of(UNSURE), qos=qos)
            replies.append(await camera.reply())
    assert len({(reply.payload, tuple(reply.words.items())) for reply in replies}) == 1
    assert (len(heavy.asked), front.counters.duplicates) == (1, 2)


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_request_that_comes_again_while_it_runs_gets_the_one_answer(broker: Mosquitto, qos: int) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded()) as front, device(broker) as camera:
        camera.send(body_of(), qos=qos)
        await model.is_running.wait()
        for _ in range(2):
            camera.send(body_of(), qos=qos)
        async with asyncio.timeout(5):
            while front.counters.duplicates < 2:
                await asyncio.sleep(0.01)
        model.release()
        assert (await camera.reply()).words["status"] == "200"
        assert await camera.hears_nothing()
        assert (model.runs, front.counters.replied) == (1, 1)


async def test_a_311_request_that_comes_again_with_less_time_left_runs_once(broker: Mosquitto) -> None:
    heavy = FakeHeavy()
    async with (
        serving(broker, echo_model(cascade=cascade_of()), heavy=heavy) as front,
        device(broker, topic=f"{REPLIES}/+", is_v5=False) as meter,
    ):
        for deadline_ms in (5000, 3000):
            meter.send(body_of(UNSURE, deadline_ms=deadline_ms), topic=f"{REQUESTS}/{CLIENT}/r7", qos=0)
            assert (await meter.reply()).body["parameters"]["status"] == 200
    assert (len(heavy.asked), front.counters.duplicates) == (1, 1)


async def test_other_content_under_the_same_correlation_is_a_conflict_and_the_first_keeps_its_answer(
    broker: Mosquitto,
) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        camera.send(body_of((0, 9, 0)))
        first = await camera.reply()
        camera.send(body_of((9, 0, 0)))
        refused = await camera.reply()
        assert (refused.words["status"], refused.words["reason"]) == ("409", "conflict")
        assert "Correlation Data" in refused.body["error"]
        camera.send(body_of((0, 9, 0)))
        assert (await camera.reply()).payload == first.payload
        assert (front.counters.refused, front.counters.duplicates) == (1, 1)


async def test_a_311_client_that_uses_an_id_twice_for_different_values_is_told(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()), device(broker, topic=f"{REPLIES}/+", is_v5=False) as meter:
        statuses = []
        for values in ((0, 9, 0), (9, 0, 0)):
            meter.send(body_of(values), topic=f"{REQUESTS}/{CLIENT}/r7", qos=0)
            statuses.append((await meter.reply()).body["parameters"]["status"])
    assert statuses == [200, 409]


async def test_a_refusal_that_says_come_again_is_not_remembered(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded(), settings={"max_in_flight": 1}) as front, device(broker) as camera:
        camera.send(body_of(), correlation=b"first")
        await model.is_running.wait()
        camera.send(body_of(), correlation=b"second")
        assert (await camera.reply()).words["status"] == "429"
        model.release()
        await camera.reply()
        camera.send(body_of(), correlation=b"second")
        assert (await camera.reply()).words["status"] == "200"
        assert front.counters.duplicates == 0


async def test_a_refusal_for_good_is_sent_again_as_it_was(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        for _ in range(2):
            camera.send(b"{")
            assert (await camera.reply()).words["status"] == "400"
        assert (front.counters.refused, front.counters.duplicates) == (1, 1)


async def test_an_answer_that_had_to_be_forgotten_before_its_time_is_counted(broker: Mosquitto) -> None:
    async with serving(broker, echo_model(), settings={"remembered_replies": 2}) as front, device(broker) as camera:
        for number in range(5):
            camera.send(body_of(), correlation=b"%d" % number)
            await camera.reply()
        assert front.counters.duplicates_forgotten == 3


async def test_an_agent_that_was_started_again_runs_a_request_that_it_has_no_memory_of(broker: Mosquitto) -> None:
    """ADR 5: what was answered is remembered within one life of the agent."""
    for _ in range(2):
        async with serving(broker, echo_model()) as front, device(broker) as camera:
            camera.send(body_of(), qos=0)
            assert (await camera.reply()).words["status"] == "200"
            assert front.counters.duplicates == 0
