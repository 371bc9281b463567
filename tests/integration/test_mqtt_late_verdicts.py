"""Two replies to one request over a real broker: provisional and final, and verdicts that come after an outage."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from core.clock import SystemClock
from core.manifest import Signature
from core.open_inference import protobuf_body
from core.open_inference.messages import InferResponse
from core.tensors import Array, Datatype, Tensor
from edge_agent.front.mqtt.broker import BrokerState
from edge_agent.runtime.pool import LoadedModel
from edge_agent.runtime.session import RunTime
from edge_agent.settings import RuntimeSettings
from tests.support.edge_front import CLIENT, REPLIES, REQUESTS, body_of, device, serving, until
from tests.support.edge_plane import (
    SURE,
    UNSURE,
    FakeDeferrals,
    FakeHeavy,
    GatedHeavy,
    away,
    cascade_of,
    echo_manifest,
    echo_model,
    request_of,
)
from tests.support.mosquitto import Mosquitto, running_mosquitto

VERDICT = InferResponse("large", "7", (Tensor("scores", Datatype.FP32, np.array([[1, 1, 1]], dtype=np.float32)),), "a")


def wide_model() -> LoadedModel:
    """A model that is unsure among a thousand classes."""
    manifest = echo_manifest(cascade=cascade_of()).model_copy(
        update={"outputs": (Signature(name="scores", datatype=Datatype.FP32, shape=(-1, 1000)),)}
    )

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        return [np.linspace(0.0, 1.0, 1000, dtype=np.float32).reshape(1, 1000)]

    return LoadedModel(
        manifest,
        manifest.digest(),
        run,
        run_time=RunTime(0.0, 0.0),
        settings=RuntimeSettings(),
        clock=SystemClock(),
    )


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


async def test_the_edges_answer_comes_at_once_and_the_verdict_behind_it(broker: Mosquitto) -> None:
    heavy = GatedHeavy()
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=heavy) as front, device(broker) as camera:
        camera.send(body_of(UNSURE), correlation=b"\x00\xff", accept_provisional="1")
        first = await camera.reply()
        assert (first.words["tier"], first.words["final"], first.words["reason"]) == ("edge", "0", "low_confidence")
        assert front.in_flight == 1
        heavy.gate.set()
        last = await camera.reply()
        assert (last.words["tier"], last.words["final"], last.words["reason"]) == ("heavy", "1", "low_confidence")
        assert (first.topic, first.correlation) == (last.topic, last.correlation) == (REPLIES, b"\x00\xff")
        assert (front.counters.provisional, front.counters.replied, front.in_flight) == (1, 2, 0)


async def test_a_311_device_gets_both_under_its_own_id(broker: Mosquitto) -> None:
    topic = f"{REPLIES}/+"
    async with serving(broker, echo_model(cascade=cascade_of())), device(broker, topic=topic, is_v5=False) as meter:
        meter.send(body_of(UNSURE, accept_provisional=1), topic=f"{REQUESTS}/{CLIENT}/r7")
        first, last = await meter.reply(), await meter.reply()
    assert first.topic == last.topic == f"{REPLIES}/r7"
    words = [(each.body["parameters"]["tier"], each.body["parameters"]["final"]) for each in (first, last)]
    assert words == [("edge", 0), ("heavy", 1)]


async def test_the_final_reply_comes_although_the_heavy_tier_fails(broker: Mosquitto) -> None:
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=away()), device(broker) as camera:
        camera.send(body_of(UNSURE), accept_provisional="1")
        first, last = await camera.reply(), await camera.reply()
    assert (first.words["final"], first.words["reason"]) == ("0", "low_confidence")
    assert (last.words["final"], last.words["tier"], last.words["reason"]) == ("1", "edge", "heavy_unavailable")


async def test_a_sure_answer_is_the_only_reply(broker: Mosquitto) -> None:
    async with serving(broker, echo_model(cascade=cascade_of())), device(broker) as camera:
        camera.send(body_of(SURE), accept_provisional="1")
        assert (await camera.reply()).words["final"] == "1"
        assert await camera.hears_nothing()


async def test_a_request_that_is_delivered_again_gets_what_has_been_sent(broker: Mosquitto) -> None:
    heavy = GatedHeavy()
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=heavy), device(broker) as camera:
        camera.send(body_of(UNSURE), accept_provisional="1")
        assert (await camera.reply()).words["final"] == "0"
        camera.send(body_of(UNSURE), accept_provisional="1")
        assert (await camera.reply()).words["final"] == "0"
        heavy.gate.set()
        assert (await camera.reply()).words["final"] == "1"
        camera.send(body_of(UNSURE), accept_provisional="1")
        assert [(await camera.reply()).words["final"] for _ in range(2)] == ["0", "1"]
        assert len(heavy.asked) == 1


async def test_an_agent_that_stops_sends_the_final_reply_first(broker: Mosquitto) -> None:
    heavy = GatedHeavy()
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=heavy) as front, device(broker) as camera:
        camera.send(body_of(UNSURE), accept_provisional="1")
        assert (await camera.reply()).words["final"] == "0"
        draining = asyncio.create_task(front.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        heavy.gate.set()
        async with asyncio.timeout(5):
            await draining
        assert (await camera.reply()).words["final"] == "1"


async def test_a_verdict_that_was_deferred_is_the_final_reply(broker: Mosquitto) -> None:
    deferrals = FakeDeferrals()
    model = echo_model(cascade=cascade_of())
    async with serving(broker, model, heavy=away(), deferrals=deferrals) as front, device(broker) as camera:
        camera.send(body_of(UNSURE), correlation=b"\x00\xff", deferrable="1")
        first = await camera.reply()
        assert (first.words["tier"], first.words["final"], first.words["reason"]) == ("edge", "0", "heavy_unavailable")
        [(_, dedupe_id, reply_to)] = deferrals.taken
        assert dedupe_id.startswith("gate-1/camera-1/")
        front.deliver(reply_to, VERDICT)
        last = await camera.reply()
        assert (last.words["tier"], last.words["final"], last.words["reason"]) == ("heavy", "1", "low_confidence")
        assert (last.words["model-version"], last.words["confidence"]) == ("7", first.words["confidence"])
        assert (last.topic, last.correlation, last.content_type) == (REPLIES, b"\x00\xff", "application/json")
        assert last.expiry_s is not None
        assert last.expiry_s > 3500
        camera.send(body_of(UNSURE), correlation=b"\x00\xff", deferrable="1")
        assert [(await camera.reply()).words["final"] for _ in range(2)] == ["0", "1"]


@pytest.mark.parametrize("content_type", ["application/json", "application/protobuf"])
async def test_a_verdict_finds_its_client_after_a_restart_of_the_agent(broker: Mosquitto, content_type: str) -> None:
    is_json = content_type == "application/json"
    body = body_of(UNSURE) if is_json else protobuf_body.encode_request(request_of(UNSURE)).SerializeToString()
    deferrals = FakeDeferrals()
    async with device(broker) as camera:
        async with serving(broker, echo_model(cascade=cascade_of()), heavy=away(), deferrals=deferrals):
            camera.send(body, content_type=content_type, deferrable="1")
            await camera.reply()
        async with serving(broker, echo_model(cascade=cascade_of())) as front:
            front.deliver(deferrals.taken[0][2], VERDICT)
            last = await camera.reply()
            assert (last.words["final"], last.content_type) == ("1", content_type)
            assert front.counters.verdicts == 1


async def test_a_311_device_gets_the_verdict_that_was_deferred(broker: Mosquitto) -> None:
    deferrals = FakeDeferrals()
    async with (
        serving(broker, echo_model(cascade=cascade_of()), heavy=away(), deferrals=deferrals) as front,
        device(broker, topic=f"{REPLIES}/+", is_v5=False) as meter,
    ):
        meter.send(body_of(UNSURE, deferrable=True), topic=f"{REQUESTS}/{CLIENT}/r7")
        assert (await meter.reply()).body["parameters"]["final"] == 0
        front.deliver(deferrals.taken[0][2], VERDICT)
        last = await meter.reply()
    assert (last.topic, last.body["parameters"]["final"]) == (f"{REPLIES}/r7", 1)


async def test_the_same_correlation_data_on_another_body_is_another_deferral(broker: Mosquitto) -> None:
    deferrals = FakeDeferrals()
    async with device(broker) as camera:
        for values in (UNSURE, UNSURE, (0.0, 0.4, 0.3)):
            # An agent that was started again does not remember what came before.
            model = echo_model(cascade=cascade_of())
            async with serving(broker, model, heavy=away(), deferrals=deferrals):
                camera.send(body_of(values), qos=0, deferrable="1")
                await camera.reply()
    first, again, other = [dedupe_id for _, dedupe_id, _ in deferrals.taken]
    assert first == again != other


async def test_a_verdict_that_comes_while_the_broker_is_away_is_sent_when_it_is_back(broker: Mosquitto) -> None:
    deferrals = FakeDeferrals()
    model = echo_model(cascade=cascade_of())
    async with serving(broker, model, heavy=away(), deferrals=deferrals) as front, device(broker) as camera:
        camera.send(body_of(UNSURE), deferrable="1")
        await camera.reply()
        await asyncio.to_thread(broker.kill)
        await until(front, BrokerState.WAITING)
        front.deliver(deferrals.taken[0][2], VERDICT)
        assert front.counters.replied == 1
        await asyncio.to_thread(broker.start)
        # The device's own client subscribes again only after a second or more; QoS 1 does not reach it before that.
        await until(front, BrokerState.ONLINE)
        assert (front.counters.replied, front.counters.late) == (2, 0)


async def test_an_address_that_is_damaged_is_counted_and_nothing_is_sent(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        front.deliver(b"{", VERDICT)
        assert await camera.hears_nothing()
        assert front.counters.unreadable_address == 1
    assert [record.levelname for record in caplog.records if "late verdict" in record.message] == ["WARNING"]


async def test_a_verdict_that_has_no_form_in_the_clients_encoding_is_refused_to_it(broker: Mosquitto) -> None:
    deferrals = FakeDeferrals()
    half = Tensor("scores", Datatype.FP16, np.array([[1, 1, 1]], dtype=np.float16))
    model = echo_model(cascade=cascade_of())
    async with serving(broker, model, heavy=away(), deferrals=deferrals) as front, device(broker) as camera:
        camera.send(body_of(UNSURE), deferrable="1")
        await camera.reply()
        front.deliver(deferrals.taken[0][2], InferResponse("large", "7", (half,)))
        last = await camera.reply()
    assert (last.words["final"], last.words["status"]) == ("1", "400")


async def test_a_provisional_answer_that_has_no_room_at_the_broker_is_refused_and_nothing_follows(
    tmp_path: Path,
) -> None:
    own = Mosquitto(tmp_path)
    with (tmp_path / "mosquitto.conf").open("a") as config:
        config.write("\nmax_packet_size 2000\n")
    own.start()
    heavy = GatedHeavy()
    try:
        async with serving(own, wide_model(), heavy=heavy) as front, device(own) as camera:
            camera.send(body_of(UNSURE), accept_provisional="1")
            reply = await camera.reply()
            assert (reply.words["status"], reply.words["final"]) == ("413", "1")
            async with asyncio.timeout(5):
                await heavy.is_left.wait()
            assert await camera.hears_nothing()
            assert front.in_flight == 0
    finally:
        own.stop()


async def test_many_provisional_answers_at_once_each_get_their_verdict(broker: Mosquitto) -> None:
    heavy = FakeHeavy()
    model = echo_model(cascade=cascade_of(), settings=RuntimeSettings())
    async with serving(broker, model, heavy=heavy), device(broker) as camera:
        for number in range(32):
            camera.send(body_of((number / 100, 0.5, 0.4)), correlation=b"%d" % number, accept_provisional="1")
        replies = [await camera.reply() for _ in range(64)]
    finals = {(each.correlation, each.words["final"]) for each in replies}
    assert finals == {(b"%d" % number, final) for number in range(32) for final in "01"}
