"""Devices that misbehave or go away, over a real broker: nobody else notices, and nothing of theirs is left behind.

Requests that come again are in `test_redelivery`, what is malformed in `tests.integration.test_mqtt_bad_input`.
"""

import asyncio
import math
import socket
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from benchmarks.raw_mqtt import sized
from core.clock import SystemClock
from core.errors import HeavyUnavailable
from core.open_inference import binary_body
from core.open_inference.messages import InferRequest
from core.tensors import Array, Datatype, Tensor
from edge_agent.front.mqtt.publication import encode_correlation, encode_expiry, encode_words, with_length
from edge_agent.runtime.pool import LoadedModel
from edge_agent.runtime.session import RunTime
from edge_agent.settings import RuntimeSettings
from tests.support.edge_front import CLIENT, REPLIES, REQUESTS, SITE, body_of, device, serving
from tests.support.edge_plane import FakeHeavy, SlowModel, away, cascade_of, echo_manifest, echo_model
from tests.support.mosquitto import Mosquitto, running_mosquitto

BINARY = "application/octet-stream"
HOSTILE = (b"", b"\xff", b"\xef\xbb\xbf", b"0" * 5000, b"-1", b"\x01\x02", b"any;drop", b"9" * 300)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


async def test_a_client_that_is_gone_costs_one_run_and_leaves_nothing_under_way(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded()) as front:
        async with device(broker) as camera:
            camera.send(body_of())
            await model.is_running.wait()
        model.release()
        async with device(broker, topic=REPLIES.replace(CLIENT, "camera-2")) as other:
            other.send(body_of(), response_topic=REPLIES.replace(CLIENT, "camera-2"))
            assert (await other.reply()).words["status"] == "200"
        assert (model.runs, front.in_flight) == (2, 0)


async def test_a_client_that_comes_back_and_asks_again_gets_the_answer_that_it_missed(broker: Mosquitto) -> None:
    model = SlowModel()
    async with serving(broker, model.loaded()) as front:
        async with device(broker) as camera:
            camera.send(body_of())
            await model.is_running.wait()
        model.release()
        async with asyncio.timeout(5):
            while front.in_flight:
                await asyncio.sleep(0.01)
        async with device(broker) as camera:
            camera.send(body_of())
            assert (await camera.reply()).words["status"] == "200"
        assert (model.runs, front.counters.duplicates) == (1, 1)


async def test_a_slow_client_that_reads_nothing_delays_nobody(broker: Mosquitto) -> None:
    slow = REPLIES.replace(CLIENT, "slow")
    reader = raw_subscriber(broker, slow)
    try:
        async with serving(broker, echo_model()) as front, device(broker) as camera, device(broker) as sender:
            for number in range(200):
                sender.send(body_of(), correlation=b"s%d" % number, response_topic=slow)
            for number in range(50):
                camera.send(body_of(), correlation=b"%d" % number)
                assert (await camera.reply(timeout_s=2.0)).words["status"] == "200"
            async with asyncio.timeout(5):
                while front.counters.replied < 250:
                    await asyncio.sleep(0.01)
            assert (front.in_flight, front.counters.late) == (0, 0)
    finally:
        reader.close()


async def test_a_311_client_is_answered_beside_an_mqtt_5_client(broker: Mosquitto) -> None:
    async with (
        serving(broker, echo_model()),
        device(broker) as camera,
        device(broker, topic=f"{REPLIES}/+", is_v5=False) as meter,
    ):
        meter.send(body_of(deadline_ms=5000), topic=f"{REQUESTS}/{CLIENT}/r7", qos=0)
        camera.send(body_of())
        modern, old = await camera.reply(), await meter.reply()
    assert modern.words["status"] == "200"
    assert (old.body["parameters"]["status"], old.topic) == (200, f"{REPLIES}/r7")


@pytest.mark.parametrize("name", ["deadline-ms", "privacy", "priority", "accept-provisional", "deferrable", "probe"])
async def test_hostile_properties_are_refused_or_ignored_and_the_next_request_is_answered(
    broker: Mosquitto, name: str
) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        sender = raw_connection(broker)
        for number, value in enumerate(HOSTILE):
            sender.sendall(raw_request(b"h%d" % number, name.encode(), value))
        camera.send(body_of(), correlation=b"afterwards")
        async with asyncio.timeout(5):
            while (await camera.reply()).correlation != b"afterwards":
                pass
        sender.close()
        assert (front.in_flight, front.last_error) == (0, None)


@pytest.mark.parametrize(
    "below", ["", "/", "digits/+", "digits/#", "$share/x/digits", "digits\x00x", "ü", "a" * 60_000]
)
async def test_hostile_topics_leave_the_agent_answering(broker: Mosquitto, below: str) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        sender = raw_connection(broker)
        topic = f"nf/v1/{SITE}/infer/gate-1/{below}".encode()
        sender.sendall(raw_request(b"h", b"deadline-ms", b"2000", topic=topic))
        camera.send(body_of())
        assert (await camera.reply()).words["status"] == "200"
        sender.close()
        assert front.last_error is None


def judged(outputs: Sequence[float]) -> LoadedModel:
    """A model that gives these scores whatever it is asked; empty: it gives none."""
    manifest = echo_manifest(cascade=cascade_of(), max_batch=1)
    scores: Array = np.array([outputs], dtype=np.float32)

    def run(_inputs: Sequence[Array]) -> Sequence[Array]:
        return [scores]

    return LoadedModel(
        manifest,
        manifest.digest(),
        run,
        run_time=RunTime(0.0, 0.0),
        settings=RuntimeSettings(),
        clock=SystemClock(),
    )


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ((math.nan, 1.0, 0.0), "not_finite"),
        ((math.inf, 1.0, 0.0), "not_finite"),
        ((), "empty"),
        ((3.0, 3.0, 0.0), "tied"),
    ],
    ids=["NaN", "infinite", "empty", "tied"],
)
async def test_an_output_that_is_no_answer_escalates(broker: Mosquitto, outputs: Sequence[float], reason: str) -> None:
    heavy = FakeHeavy()
    async with serving(broker, judged(outputs), heavy=heavy), device(broker) as camera:
        camera.send(body_of())
        reply = await camera.reply()
    assert (reply.words["status"], reply.words["tier"], reply.words["reason"]) == ("200", "heavy", reason)
    assert len(heavy.asked) == 1


@pytest.mark.parametrize("outputs", [(math.nan, 1.0, 0.0), (), (3.0, 3.0, 0.0)], ids=["NaN", "empty", "tied"])
async def test_an_output_that_is_no_answer_is_given_to_nobody_when_the_heavy_tier_is_away(
    broker: Mosquitto, outputs: Sequence[float]
) -> None:
    async with serving(broker, judged(outputs), heavy=away()), device(broker) as camera:
        camera.send(body_of())
        reply = await camera.reply()
    assert (reply.words["status"], reply.words["reason"]) == ("503", HeavyUnavailable.code.value)
    assert "retry-after-ms" in reply.words


async def test_a_picture_of_nan_escalates(broker: Mosquitto) -> None:
    pixels = np.full((1, 3), np.nan, dtype=np.float32)
    body, header = binary_body.encode_request(InferRequest("digits", (Tensor("x", Datatype.FP32, pixels),)))
    async with serving(broker, echo_model(cascade=cascade_of())), device(broker) as camera:
        camera.send(body, content_type=BINARY, inference_header_content_length=str(header))
        reply = await camera.reply()
    assert (reply.words["tier"], reply.words["reason"]) == ("heavy", "not_finite")


def raw_connection(broker: Mosquitto, client: str = "") -> socket.socket:
    """Return a connection on which a test can say anything; the broker has accepted it."""
    connection = socket.create_connection((broker.host, broker.port), timeout=5)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    body = b"\x00\x04MQTT\x05\x02\x00\x3c\x00" + sized(client.encode())
    connection.sendall(b"\x10" + with_length(body))
    assert connection.recv(4)[0] == 0x20
    return connection


def raw_subscriber(broker: Mosquitto, topic: str) -> socket.socket:
    connection = raw_connection(broker, "slow")
    connection.sendall(b"\x82" + with_length(b"\x00\x01\x00" + sized(topic.encode()) + b"\x00"))
    return connection


def raw_request(correlation: bytes, name: bytes, value: bytes, *, topic: bytes = REQUESTS.encode()) -> bytes:
    """Return a PUBLISH with a user property whose bytes are as given."""
    properties = encode_expiry(5) + b"\x08" + sized(REPLIES.encode()) + encode_correlation(correlation)
    properties += b"\x26" + struct.pack("!H", len(name)) + name + struct.pack("!H", len(value)) + value
    properties += encode_words([("x", "y")])
    return b"\x30" + with_length(sized(topic) + with_length(properties) + body_of())
