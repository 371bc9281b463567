"""Devices and an agent's MQTT front over a real mosquitto: every encoding, both protocols, and one reply each."""

import asyncio
import math
from collections.abc import Iterator

import numpy as np
import pytest

from core.clock import SystemClock
from core.open_inference import binary_body, protobuf_body
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor
from edge_agent.client import DeviceClient, Protocol
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import RuntimeSettings
from protos.inference.v2 import open_inference_pb2 as pb
from tests.support.edge_front import AGENT, CLIENT, REPLIES, REQUESTS, SITE, body_of, device, serving
from tests.support.edge_plane import SURE, UNSURE, FakeHeavy, away, cascade_of, echo_model, request_of
from tests.support.mosquitto import Mosquitto, program_path, running_mosquitto

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


async def test_mosquitto_rr_gets_its_answer(broker: Mosquitto) -> None:
    arguments = ["-V", "5", "-h", broker.host, "-p", str(broker.port), "-W", "5", "-t", REQUESTS, "-e", REPLIES]
    arguments += ["-D", "publish", "message-expiry-interval", "5", "-D", "publish", "correlation-data", "r1"]
    arguments += ["-m", body_of().decode(), "-F", "%P|%D|%p"]
    async with serving(broker, echo_model(cascade=cascade_of())):
        process = await asyncio.create_subprocess_exec(
            program_path("mosquitto_rr"), *arguments, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
    assert process.returncode == 0
    for word in ("status:200", "tier:edge", "model-version:3", f"agent:{AGENT}", "final:1", "reason:confident"):
        assert word in output.decode()
    assert '"data":[0.0,9.0,0.0]' in output.decode()


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_reply_has_the_correlation_the_qos_and_an_expiry(broker: Mosquitto, qos: int) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        camera.send(body_of(), qos=qos, correlation=b"\x00\xff", deadline_ms="4500")
        reply = await camera.reply()
        assert (reply.topic, reply.correlation, reply.qos, reply.content_type) == (
            REPLIES,
            b"\x00\xff",
            qos,
            "application/json",
        )
        assert reply.expiry_s is not None
        assert 1 <= reply.expiry_s <= 5
        assert front.counters.replied == 1


@pytest.mark.parametrize("protocol", list(Protocol))
async def test_the_device_client_is_answered(broker: Mosquitto, protocol: Protocol) -> None:
    request = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": list(SURE)}]}
    address = (broker.host, broker.port)
    async with serving(broker, echo_model(cascade=cascade_of())):

        def ask() -> tuple[int, str, list[float]]:
            with DeviceClient("camera-9", site=SITE, broker=address, protocol=protocol) as client:
                reply = client.ask("digits", request, agent=AGENT)
                return reply.status, reply.tier, reply.body["outputs"][0]["data"]

        assert await asyncio.to_thread(ask) == (200, "edge", list(SURE))


async def test_a_binary_body_is_answered_with_one(broker: Mosquitto) -> None:
    body, header_length = binary_body.encode_request(request_of())
    async with serving(broker, echo_model()), device(broker) as camera:
        camera.send(body, content_type="application/octet-stream", inference_header_content_length=str(header_length))
        reply = await camera.reply()
    assert reply.content_type == "application/octet-stream"
    length = int(reply.words["inference-header-content-length"])
    response = binary_body.decode_response(reply.payload, header_length=length)
    assert response.outputs[0].array.tolist() == [list(SURE)]


async def test_a_protobuf_body_is_answered_with_one(broker: Mosquitto) -> None:
    body = protobuf_body.encode_request(request_of()).SerializeToString()
    async with serving(broker, echo_model()), device(broker) as camera:
        camera.send(body, content_type="application/protobuf")
        reply = await camera.reply()
    assert reply.content_type == "application/protobuf"
    response = protobuf_body.decode_response(pb.ModelInferResponse.FromString(reply.payload))
    assert response.outputs[0].array.tolist() == [list(SURE)]


async def test_a_311_device_finds_everything_in_the_body(broker: Mosquitto) -> None:
    topic = f"{REPLIES}/+"
    async with serving(broker, echo_model(cascade=cascade_of())), device(broker, topic=topic, is_v5=False) as meter:
        meter.send(body_of(SURE, deadline_ms=3000, privacy="site"), topic=f"{REQUESTS}/{CLIENT}/r7")
        reply = await meter.reply()
    assert reply.topic == f"{REPLIES}/r7"
    parameters = reply.body["parameters"]
    assert (parameters["status"], parameters["tier"], parameters["final"]) == (200, "edge", 1)


async def test_an_agent_on_a_311_connection_serves_311_devices(broker: Mosquitto) -> None:
    topic = f"{REPLIES}/+"
    async with serving(broker, echo_model(), settings={"protocol": 4}), device(broker, topic=topic, is_v5=False) as m:
        m.send(body_of(), topic=f"{REQUESTS}/{CLIENT}/r7")
        assert (await m.reply()).body["parameters"]["status"] == 200


async def test_one_agent_of_the_site_takes_what_is_meant_for_any(broker: Mosquitto) -> None:
    topic = f"nf/v1/{SITE}/infer/any/digits"
    async with (
        serving(broker, echo_model()) as one,
        serving(broker, echo_model(), agent="gate-2") as other,
        device(broker) as camera,
    ):
        for number in range(6):
            camera.send(body_of(), topic=topic, correlation=b"%d" % number)
        replies = [await camera.reply() for _ in range(6)]
        assert await camera.hears_nothing()
        assert sorted(reply.correlation for reply in replies) == [b"%d" % number for number in range(6)]
        assert one.counters.received + other.counters.received == 6


async def test_64_requests_at_once_each_get_their_own_answer(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()) as front, device(broker) as camera:
        for number in range(64):
            camera.send(body_of((number, 0.5, 0.25)), correlation=b"%d" % number)
        replies = [await camera.reply() for _ in range(64)]
        assert {reply.correlation: reply.body["outputs"][0]["data"][0] for reply in replies} == {
            b"%d" % number: number for number in range(64)
        }
        assert (front.counters.received, front.counters.replied, front.in_flight) == (64, 64, 0)


async def test_an_unsure_answer_comes_from_the_heavy_tier(broker: Mosquitto) -> None:
    async with serving(broker, echo_model(cascade=cascade_of())), device(broker) as camera:
        camera.send(body_of(UNSURE))
        reply = await camera.reply()
    assert (reply.words["tier"], reply.words["reason"], reply.words["model-version"]) == (
        "heavy",
        "low_confidence",
        "7",
    )
    assert reply.body["model_name"] == "large"


async def test_nan_from_the_edge_model_escalates(broker: Mosquitto) -> None:
    tensor = Tensor("x", Datatype.FP32, np.array([[math.nan, 1, 0]], dtype=np.float32))
    body = protobuf_body.encode_request(InferRequest("digits", (tensor,))).SerializeToString()
    async with serving(broker, echo_model(cascade=cascade_of())), device(broker) as camera:
        camera.send(body, content_type="application/protobuf")
        reply = await camera.reply()
    assert (reply.words["tier"], reply.words["reason"]) == ("heavy", "not_finite")


async def test_with_the_heavy_tier_away_the_edge_answers(broker: Mosquitto) -> None:
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=away()), device(broker) as camera:
        camera.send(body_of(UNSURE))
        reply = await camera.reply()
    assert (reply.words["status"], reply.words["tier"], reply.words["reason"]) == ("200", "edge", "heavy_unavailable")


async def test_nan_with_the_heavy_tier_away_is_an_error_and_not_garbage(broker: Mosquitto) -> None:
    tensor = Tensor("x", Datatype.FP32, np.array([[math.nan, 1, 0]], dtype=np.float32))
    body = protobuf_body.encode_request(InferRequest("digits", (tensor,))).SerializeToString()
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=away()), device(broker) as camera:
        camera.send(body, content_type="application/protobuf")
        reply = await camera.reply()
    assert reply.words["status"] == "503"
    assert "not_finite" in reply.body["error"]


async def test_the_privacy_property_keeps_a_request_here(broker: Mosquitto) -> None:
    heavy = FakeHeavy()
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=heavy), device(broker) as camera:
        camera.send(body_of(UNSURE), privacy="device")
        reply = await camera.reply()
    assert (reply.words["reason"], heavy.asked) == ("privacy", [])


async def test_the_reply_to_a_sampled_request_names_the_span_that_served_it(broker: Mosquitto) -> None:
    async with serving(broker, echo_model()), device(broker) as camera:
        camera.send(body_of(), traceparent=SAMPLED)
        reply = await camera.reply()
    version, trace_id, span_id, flags = reply.words["traceparent"].split("-")
    assert (version, trace_id) == ("00", SAMPLED.split("-")[1])
    assert span_id != SAMPLED.split("-")[2]
    assert int(flags, 16) & 1


async def test_a_request_that_is_delivered_again_runs_once_and_gets_the_same_reply(broker: Mosquitto) -> None:
    heavy = FakeHeavy()
    async with serving(broker, echo_model(cascade=cascade_of()), heavy=heavy) as front, device(broker) as camera:
        camera.send(body_of(UNSURE), correlation=b"same")
        first = await camera.reply()
        camera.send(body_of(UNSURE), correlation=b"same")
        second = await camera.reply()
        assert (first.payload, first.words) == (second.payload, second.words)
        assert (len(heavy.asked), front.counters.duplicates) == (1, 1)


async def test_the_status_of_an_agent_is_retained_with_its_models(broker: Mosquitto) -> None:
    status = f"nf/v1/{SITE}/agents/{AGENT}/status"
    async with serving(broker, echo_model()) as front, device(broker, topic=status) as watcher:
        born = (await watcher.reply()).body
        assert (born["state"], born["models"]) == (
            "online",
            [{"name": "digits", "version": "3", "variant": "int8-static", "resident": True}],
        )
        front.announce()
        assert (await watcher.reply()).body["epoch"] == born["epoch"]
    async with device(broker, topic=status) as watcher:
        gone = (await watcher.reply()).body
        assert (gone["state"], gone["epoch"]) == ("offline", born["epoch"])
    async with serving(broker, echo_model()), device(broker, topic=status) as watcher:
        assert (await watcher.reply()).body["epoch"] > born["epoch"]


async def test_models_that_come_later_are_announced(broker: Mosquitto) -> None:
    status = f"nf/v1/{SITE}/agents/{AGENT}/status"
    pool = ModelPool(RuntimeSettings(), clock=SystemClock())
    async with serving(broker, pool=pool), device(broker, topic=status) as watcher:
        assert (await watcher.reply()).body["models"] == []
        await pool.host(echo_model())
        assert [model["name"] for model in (await watcher.reply()).body["models"]] == ["digits"]
