"""What an agent drops of a `device` payload: nothing, whatever becomes of the request, but the reply to who asked."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio
import httpx
import numpy as np
import orjson
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from core.addresses import Address
from core.clock import SystemClock
from core.errors import InternalError
from core.exposition import written
from core.grpc_transport import TransportCredentials, open_channel
from core.keeping import KeepRule
from core.logs import JsonFormatter
from core.manifest import Signature
from core.metrics import Registry
from core.open_inference import protobuf_body
from core.open_inference.messages import InferRequest
from core.telemetry import Tracing, TracingSettings
from core.tensors import Array, Datatype, Tensor
from edge_agent.front.grpc import GrpcFront
from edge_agent.front.http.inference import OpenInferenceRoutes
from edge_agent.front.http.routes import Tasks, routing
from edge_agent.front.http.server import HttpFront
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.runtime.pool import LoadedModel
from edge_agent.runtime.session import RunTime
from edge_agent.settings import RuntimeSettings
from protos.inference.v2 import open_inference_pb2_grpc as services
from tests.support.edge_front import AGENT, SITE, Device, Received, device, serving
from tests.support.edge_plane import (
    FakeDeferrals,
    FakeExamples,
    FakeHeavy,
    cascade_of,
    echo_manifest,
    plane_with,
)
from tests.support.mosquitto import Mosquitto, running_mosquitto

CLOCK = SystemClock()
# Stands in the payload, the request's id, its correlation data and the name of the client.
MARK = "zk7qmark"
CLIENT = f"camera-{MARK}"
REPLIES = f"nf/v1/{SITE}/clients/{CLIENT}/replies"
REQUESTS = f"nf/v1/{SITE}/infer/{AGENT}/digits/{CLIENT}"
SURE, UNSURE, NOT_FINITE, FAILING, BROKEN = "sure", "unsure", "nan", "failing", "broken"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running_mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


def text_model() -> LoadedModel:
    """A model that takes text and is as sure of it as the text says; its errors quote what it was given."""
    manifest = echo_manifest(cascade=cascade_of(), max_batch=1).model_copy(
        update={
            "inputs": (Signature(name="text", datatype=Datatype.BYTES, shape=(1,)),),
            "outputs": (Signature(name="scores", datatype=Datatype.FP32, shape=(1, 3)),),
        }
    )

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        word = bytes(inputs[0][0]).decode().partition(" ")[0]
        if word == FAILING:
            raise ValueError(f"cannot take {inputs[0][0]!r}")
        if word == BROKEN:
            # As ONNX Runtime's errors come out of `OnnxModel.run`.
            raise InternalError(f"model digits: the run failed: index {inputs[0][0]!r} out of bounds")
        first = {SURE: 9.0, UNSURE: 0.1, NOT_FINITE: np.nan}[word]
        return [np.array([[first, 0.0, 0.0]], dtype=np.float32)]

    return LoadedModel(
        manifest, manifest.digest(), run, run_time=RunTime(0.0, 0.0), settings=RuntimeSettings(), clock=CLOCK
    )


def body_of(text: str, **parameters: object) -> bytes:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [f"{text} {MARK}"]}
    return orjson.dumps({"id": f"id-{MARK}", "inputs": [tensor], "parameters": parameters})


@dataclass
class Watched:
    """Everything that an agent could drop something in."""

    front: MqttFront
    camera: Device
    heavy: FakeHeavy
    deferrals: FakeDeferrals
    examples: FakeExamples
    spans: InMemorySpanExporter
    metrics: Registry
    records: Sequence[logging.LogRecord]

    async def ask(self, text: str, **words: Any) -> Received:
        self.camera.send(body_of(text), topic=REQUESTS, response_topic=REPLIES, correlation=MARK.encode(), **words)
        return await self.camera.reply()

    def traces(self) -> list[str]:
        return [span.to_json() for span in self.spans.get_finished_spans()]

    def require_silence(self, *, of: str = MARK) -> None:
        """Raise if anything but the reply has got a hint."""
        logs = [JsonFormatter().format(record) for record in self.records]
        leaked = [text for text in (*logs, *self.traces()) if of in text]
        leaked += [text for text in [written(self.metrics.families(), is_open_metrics=True).decode()] if of in text]
        leaked += [text for text in [orjson.dumps(self.front.status()).decode()] if of in text]
        assert leaked == []
        assert (self.heavy.asked, self.deferrals.taken, self.examples.offered) == ([], [], [])


def recording(sample_ratio: float = 1.0) -> tuple[Tracing, InMemorySpanExporter]:
    """Trace everything, or at a ratio of zero keep whatever can be kept: every request counts as slow."""
    tracing = Tracing("test", TracingSettings(None, sample_ratio, keep=KeepRule(0.0, 1000.0)))
    exporter = InMemorySpanExporter()
    tracing._provider.add_span_processor(SimpleSpanProcessor(exporter))
    return tracing, exporter


@asynccontextmanager
async def watched(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture, *, sample_ratio: float = 1.0
) -> AsyncIterator[Watched]:
    caplog.set_level(logging.DEBUG)
    tracing, exporter = recording(sample_ratio)
    heavy, deferrals, examples, metrics = FakeHeavy(), FakeDeferrals(), FakeExamples(), Registry()
    async with (
        serving(
            broker,
            text_model(),
            heavy=heavy,
            tracing=tracing,
            deferrals=deferrals,
            examples=examples,
            metrics=metrics,
        ) as front,
        device(broker, topic=REPLIES, client_id=CLIENT) as camera,
    ):
        yield Watched(front, camera, heavy, deferrals, examples, exporter, metrics, caplog.records)


@pytest.mark.parametrize("sample_ratio", [1.0, 0.0], ids=["sampled", "kept"])
@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        (SURE, "200", "confident"),
        (UNSURE, "200", "privacy"),
        (NOT_FINITE, "403", "forbidden"),
        (FAILING, "500", "internal"),
        (BROKEN, "500", "internal"),
    ],
)
async def test_whatever_becomes_of_a_private_request_only_its_reply_tells(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture, text: str, status: str, reason: str, sample_ratio: float
) -> None:
    async with watched(broker, caplog, sample_ratio=sample_ratio) as agent:
        words = {"privacy": "device", "accept_provisional": "1", "deferrable": "1"}
        reply = await agent.ask(text, **words)
        assert (reply.words["status"], reply.words["reason"], reply.words["final"]) == (status, reason, "1")
        assert reply.correlation == MARK.encode()
        assert len(agent.traces()) > 0
        agent.require_silence()


async def test_the_trace_of_a_private_request_tells_neither_its_size_nor_how_sure_the_answer_is(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(broker, caplog) as agent:
        reply = await agent.ask(SURE, privacy="device")
        assert "confidence" in reply.words
        [root] = [span for span in agent.spans.get_finished_spans() if span.name == "process digits"]
        assert root.attributes is not None
        assert root.attributes["nanofleet.privacy"] == "device"
        assert not {"nanofleet.confidence", "messaging.message.body.size"} & root.attributes.keys()


async def test_the_trace_of_another_request_tells_who_asked(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(broker, caplog) as agent:
        await agent.ask(SURE)
        traces = agent.traces()
        assert any(CLIENT in trace for trace in traces)
        # Never the payload, the id or the correlation data, whatever the class.
        assert not any(re.search(rf"id-{MARK}|{SURE} {MARK}", trace) for trace in traces)


@pytest.mark.parametrize(
    "parameters", [{"timeout": MARK}, {"priority": MARK}, {"deadline_ms": MARK}], ids=lambda words: str(list(words))
)
async def test_a_private_request_that_is_refused_for_a_word_of_it_is_not_quoted(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture, parameters: dict[str, str]
) -> None:
    async with watched(broker, caplog) as agent:
        # The body's own word, where that counts, or the one beside it.
        words: dict[str, Any] = {} if "timeout" in parameters else dict(parameters)
        body = body_of(SURE, **parameters)
        agent.camera.send(
            body, topic=REQUESTS, response_topic=REPLIES, correlation=MARK.encode(), privacy="device", **words
        )
        assert (await agent.camera.reply()).words["status"] == "400"
        agent.require_silence()


@pytest.mark.parametrize(
    "tensor",
    [
        {"name": MARK, "shape": [1], "datatype": "BYTES", "data": [MARK]},
        {"name": "text", "shape": [2], "datatype": "BYTES", "data": [MARK, MARK]},
        {"name": "text", "shape": [1], "datatype": "FP32", "data": [MARK]},
        {"name": "text", "shape": [1], "datatype": MARK, "data": [MARK]},
        {"name": "text", "shape": [MARK], "datatype": "BYTES", "data": [MARK]},
    ],
    ids=["name", "shape", "element", "datatype", "dimension"],
)
async def test_a_private_tensor_that_does_not_fit_is_not_quoted(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture, tensor: dict[str, object]
) -> None:
    async with watched(broker, caplog) as agent:
        agent.camera.send(
            orjson.dumps({"id": MARK, "inputs": [tensor]}),
            topic=REQUESTS,
            response_topic=REPLIES,
            correlation=MARK.encode(),
            privacy="device",
        )
        assert (await agent.camera.reply()).words["status"] == "400"
        agent.require_silence()


async def test_a_defect_on_the_way_of_a_private_request_is_logged_without_its_text(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(broker, caplog) as agent:

        def fail(exchange: Any, answer: Any) -> None:
            raise KeyError(exchange.publication.payload, exchange.address)

        monkeypatch.setattr(agent.front, "_answer", fail)
        assert (await agent.ask(SURE, privacy="device")).words["status"] == "500"
        errors = [record for record in agent.records if record.levelno == logging.ERROR]
        assert ["KeyError" in JsonFormatter().format(record) for record in errors] == [True]
        agent.require_silence()


async def test_a_private_request_of_a_311_device_leaves_nothing_of_its_topic(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(broker, caplog) as agent, device(broker, topic=f"{REPLIES}/+", is_v5=False) as meter:
        meter.send(body_of(UNSURE, privacy="device"), topic=f"{REQUESTS}/{MARK}")
        assert (await meter.reply()).body["parameters"]["reason"] == "privacy"
        assert len(agent.traces()) > 0
        agent.require_silence()


async def test_a_request_id_in_a_topic_that_is_malformed_does_not_stand_in_the_log(
    broker: Mosquitto, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(broker, caplog) as agent, device(broker, topic=f"{REPLIES}/+", is_v5=False) as meter:
        base = f"nf/v1/{SITE}/infer/{AGENT}/digits/camera-1"
        meter.send(body_of(SURE, privacy="device"), topic=f"{base}/-{MARK}")
        async with asyncio.timeout(5):
            while not agent.front.counters.malformed_topic:
                await asyncio.sleep(0.01)
        agent.require_silence()


@pytest.mark.parametrize("text", [SURE, UNSURE, NOT_FINITE, FAILING, BROKEN])
async def test_the_local_http_face_drops_nothing_of_a_private_request(
    caplog: pytest.LogCaptureFixture, text: str
) -> None:
    caplog.set_level(logging.DEBUG)
    tracing, exporter = recording()
    heavy, deferrals, examples = FakeHeavy(), FakeDeferrals(), FakeExamples()
    plane = await plane_with(text_model(), heavy=heavy, tracing=tracing, deferrals=deferrals, examples=examples)
    tasks = Tasks()
    protocol = OpenInferenceRoutes(plane, server_name="agent", server_version="1", extensions=(), tasks=tasks)
    front = HttpFront(Address("127.0.0.1", 0), routing(protocol.find, fixed={}), clock=CLOCK)
    async with httpx.AsyncClient(base_url=f"http://{await front.start()}") as client:
        content = body_of(text, privacy="device")
        response = await client.post("/v2/models/digits/infer", content=content)
    assert response.status_code == {SURE: 200, UNSURE: 200, NOT_FINITE: 403}.get(text, 500)
    await front.stop(0)
    await tasks.close()
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    assert [line for line in (JsonFormatter().format(record) for record in ours) if MARK in line] == []
    assert len(exporter.get_finished_spans()) > 0
    assert [span for span in exporter.get_finished_spans() if MARK in span.to_json()] == []
    assert (heavy.asked, deferrals.taken, examples.offered) == ([], [], [])


async def test_the_local_grpc_face_drops_nothing_of_a_private_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tracing, exporter = recording()
    heavy, deferrals, examples = FakeHeavy(), FakeDeferrals(), FakeExamples()
    plane = await plane_with(text_model(), heavy=heavy, tracing=tracing, deferrals=deferrals, examples=examples)
    front = GrpcFront(
        plane, bind=Address("127.0.0.1", 0), credentials=TransportCredentials.local().server, clock=CLOCK, version="1"
    )
    channel = open_channel(await front.start(), TransportCredentials.local())
    stub = services.GRPCInferenceServiceStub(channel)
    for text in (SURE, UNSURE, NOT_FINITE, FAILING, BROKEN):
        tensor = Tensor("text", Datatype.BYTES, np.array([f"{text} {MARK}".encode()], dtype=object))
        request = InferRequest("digits", (tensor,), id=MARK, parameters={"privacy": "device"})
        with suppress(grpc.aio.AioRpcError):
            await stub.ModelInfer(protobuf_body.encode_request(request))
    await channel.close()
    await front.stop(0)
    assert len(exporter.get_finished_spans()) > 0
    ours = [record for record in caplog.records if not record.name.startswith("grpc._cython")]
    assert [line for line in (JsonFormatter().format(record) for record in ours) if MARK in line] == []
    assert [span for span in exporter.get_finished_spans() if MARK in span.to_json()] == []
    assert (heavy.asked, deferrals.taken, examples.offered) == ([], [], [])
