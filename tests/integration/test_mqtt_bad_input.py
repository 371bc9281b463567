"""What devices send wrongly: refused with the reason, or dropped and counted; and the next request is answered."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from core.deadline import Deadline
from core.open_inference.messages import InferRequest, InferResponse
from core.tensors import Datatype, Tensor
from tests.support.edge_front import CLIENT, REPLIES, REQUESTS, SITE, Device, Received, body_of, device, serving
from tests.support.edge_plane import UNSURE, FakeHeavy, SlowModel, cascade_of, echo_model
from tests.support.mosquitto import Mosquitto, running_mosquitto

INT_BODY = b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "INT64", "data": [1, 2, 3]}]}'
NO_MODEL = f"nf/v1/{SITE}/infer/gate-1/letters"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


class FakeHeavyWith(FakeHeavy):
    """A heavy tier that gives one answer to everything."""

    def __init__(self, answer: InferResponse) -> None:
        super().__init__()
        self._answer = answer

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse:
        return self._answer


async def answers_still(camera: Device) -> bool:
    camera.send(body_of(), correlation=b"afterwards")
    reply = await camera.reply()
    return (reply.correlation, reply.words["status"]) == (b"afterwards", "200")


@pytest.mark.parametrize(
    ("body", "topic", "status", "message"),
    [
        (body_of(), NO_MODEL, "404", "letters"),
        (b"{", REQUESTS, "400", "JSON"),
        (b"", REQUESTS, "400", "JSON"),
        (b"\xff\xfe", REQUESTS, "400", "JSON"),
        (b"[" * 5000 + b"]" * 5000, REQUESTS, "400", "nested"),
        (body_of((1.0, 2.0)), REQUESTS, "400", "expected shape [-1, 3], got [1, 2]"),
        (INT_BODY, REQUESTS, "400", "expected datatype FP32, got INT64"),
        (b'{"inputs": []}', REQUESTS, "400", "expected at least one tensor"),
        (b'{"inputs": [{"name": "x", "shape": [9000000000, 3], "datatype": "FP32", "data": []}]}', REQUESTS, "413", ""),
        (b" " * 5000, REQUESTS, "413", "expected at most 4096 bytes, got 5000"),
    ],
    ids=[
        "unknown model",
        "malformed JSON",
        "empty",
        "no text",
        "nested deep",
        "wrong shape",
        "wrong datatype",
        "no inputs",
        "huge shape",
        "too large",
    ],
)
async def test_bad_input_is_refused_with_the_reason(
    broker: Mosquitto, body: bytes, topic: str, status: str, message: str
) -> None:
    limit = 4096 if status == "413" else 1 << 20
    async with (
        serving(broker, echo_model(), settings={"max_body_bytes": limit}) as front,
        device(broker) as camera,
    ):
        camera.send(body, topic=topic)
        reply = await camera.reply()
        assert (reply.correlation, reply.words["status"]) == (b"r1", status)
        assert message in reply.words["status-message"]
        assert reply.body["error"] == reply.words["status-message"]
        assert front.counters.refused == 1
        assert await answers_still(camera)


async def test_a_311_device_reads_the_refusal_in_the_body(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()), device(broker, topic=f"{REPLIES}/+", is_v5=False) as meter:
        meter.send(b"{", topic=f"{REQUESTS}/{CLIENT}/r7")
        reply = await meter.reply()
    assert (reply.topic, reply.body["parameters"]["status"]) == (f"{REPLIES}/r7", 400)


async def test_a_text_that_paho_dislikes_does_not_lock_the_agent_out(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        camera.send(body_of(), privacy="\ufeffany")
        reply = await camera.reply()
        assert reply.words["status"] == "403"
        assert await answers_still(camera)
        assert front.last_error is None


async def test_an_unknown_privacy_class_is_refused(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()), device(broker) as camera:
        camera.send(body_of(), privacy="public")
        assert (await camera.reply()).words["status"] == "403"


async def test_a_reply_that_the_broker_does_not_take_is_refused_as_too_large(tmp_path: Path) -> None:
    own = Mosquitto(tmp_path)
    with (tmp_path / "mosquitto.conf").open("a") as config:
        config.write("\nmax_packet_size 2000\n")
    own.start()
    try:
        scores = Tensor("scores", Datatype.FP32, np.zeros((1, 1000), dtype=np.float32))
        heavy = FakeHeavyWith(InferResponse("large", "7", (scores,)))
        async with serving(own, echo_model(cascade=cascade_of()), heavy=heavy) as front, device(own) as camera:
            camera.send(body_of(UNSURE))
            reply = await camera.reply()
            assert (reply.words["status"], front.last_error) == ("413", None)
            assert await answers_still(camera)
    finally:
        own.stop()


async def test_a_defect_behind_the_plane_is_logged_once_and_refused(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer that has no form on the wire: its version is no text."""
    answer = InferResponse("large", cast("str", None), ())
    async with (
        serving(broker, echo_model(cascade=cascade_of()), heavy=FakeHeavyWith(answer)) as front,
        device(broker) as camera,
    ):
        camera.send(body_of(UNSURE))
        reply = await camera.reply()
        assert (reply.words["status"], reply.words["reason"]) == ("500", "internal")
        assert await answers_still(camera)
        assert (front.counters.refused, front.in_flight) == (1, 0)
    assert len([one for one in caplog.records if "defect" in one.message]) == 1


async def test_an_expired_request_is_dropped_and_counted(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        camera.send(body_of(), deadline_ms="0")
        assert await camera.hears_nothing()
        assert (front.counters.expired, front.counters.replied) == (1, 0)
        assert await answers_still(camera)


async def test_a_request_that_cannot_be_answered_in_time_is_told_at_once_when_to_come_again(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded(expected_s=10.0)), device(broker) as camera:
        camera.send(body_of(), correlation=b"first", expiry_s=60)
        await model.is_running.wait()
        camera.send(body_of(), correlation=b"second", expiry_s=2)
        reply = await camera.reply()
        assert (reply.correlation, reply.words["status"]) == (b"second", "429")
        assert 17_000 < int(reply.words["retry-after-ms"]) < 20_000
        model.release()
        assert (await camera.reply()).correlation == b"first"


async def test_a_request_that_expires_in_the_queue_is_never_run_and_counted(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded()) as front, device(broker) as camera:
        camera.send(body_of(), correlation=b"first")
        await model.is_running.wait()
        camera.send(body_of((1, 2, 3)), correlation=b"second", deadline_ms="50")
        await asyncio.sleep(0.1)
        model.release()
        assert (await camera.reply()).correlation == b"first"
        assert await camera.hears_nothing()
        assert (front.counters.expired, model.runs) == (1, 1)


async def test_an_answer_that_comes_too_late_is_not_sent_and_counted(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded()) as front, device(broker) as camera:
        camera.send(body_of(), deadline_ms="100")
        await model.is_running.wait()
        await asyncio.sleep(0.15)
        model.release()
        assert await camera.hears_nothing()
        assert (front.counters.late, front.counters.replied) == (1, 0)


async def test_a_missing_response_topic_is_counted_and_logged_once(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        for _ in range(3):
            camera.send(body_of(), response_topic=None)
        assert await answers_still(camera)
        assert front.counters.missing_response_topic == 3
    warnings = [one for one in caplog.records if one.levelno == logging.WARNING and "answered" in one.message]
    assert len(warnings) == 1


@pytest.mark.parametrize("foreign", ["somewhere/else", "nf/v1/paris/clients/camera-1/replies", f"{REPLIES}x"])
async def test_a_foreign_response_topic_is_refused_and_nothing_is_published_there(
    broker: Mosquitto, foreign: str
) -> None:
    async with (
        serving(broker, echo_model()) as front,
        device(broker) as camera,
        device(broker, topic=foreign) as stranger,
    ):
        camera.send(body_of(), response_topic=foreign)
        assert await answers_still(camera)
        assert await stranger.hears_nothing()
        assert front.counters.foreign_response_topic == 1


@pytest.mark.parametrize("below", ["dig its", "a" * 65, "digits//r1", "digits/ /r1", ".hidden"])
async def test_a_hostile_topic_is_dropped_and_counted(broker: Mosquitto, below: str) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        camera.send(body_of(), topic=f"nf/v1/{SITE}/infer/gate-1/{below}")
        assert await answers_still(camera)
        assert front.counters.malformed_topic == 1


async def test_a_live_request_with_the_retain_flag_does_not_come_again(broker: Mosquitto) -> None:
    async with device(broker) as camera:
        async with serving(broker, echo_model()):
            camera.send(body_of(), retain=True)
            assert (await camera.reply()).words["status"] == "200"
        async with serving(broker, echo_model()) as front:
            assert await camera.hears_nothing()
            assert front.counters.replied == 0
        camera.send(b"", retain=True)


async def test_more_requests_than_the_agent_takes_are_refused_with_a_time_to_come_back(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded(), settings={"max_in_flight": 2}) as front, device(broker) as camera:
        for number in range(3):
            camera.send(body_of(), correlation=b"%d" % number)
        refused = await camera.reply()
        assert (refused.correlation, refused.words["status"]) == (b"2", "429")
        assert int(refused.words["retry-after-ms"]) > 0
        model.release()
        others: list[Received] = [await camera.reply() for _ in range(2)]
        assert {reply.words["status"] for reply in others} == {"200"}
        camera.send(body_of(), correlation=b"2")
        assert (await camera.reply()).words["status"] == "200"
        assert front.counters.duplicates == 0
