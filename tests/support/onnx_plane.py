"""A data plane of one process that runs real ONNX models, and its faces on real ports.

It stands where the gateway stands, without Ray: the protocol checks of `tests/conformance` run against it in seconds.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio

from controller.api.http_server import HttpServer
from controller.api.open_inference_http import create_open_inference_app
from core.addresses import Address
from core.clock import SystemClock
from core.errors import DeadlineExceeded, Forbidden, UnknownModel
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials
from core.open_inference.grpc_face import OpenInferenceServicer, add_open_inference
from core.open_inference.messages import InferRequest, InferResponse, ModelIndexEntry, ModelMetadata
from core.open_inference.service import Call
from core.open_inference.signature import ModelSignature
from core.tensors import NUMPY_DTYPE, Array, Datatype, Tensor, TensorSpec
from tests.support import conformance_models as models

# Before the first import of onnxruntime, which otherwise reports to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

START_TIMEOUT_S = 30.0
VERSION = "1"
BRAIN_FLOATS = "brain-floats"


class Runnable(Protocol):
    signature: ModelSignature

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...


class OnnxModel:
    def __init__(self, content: bytes, specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]]) -> None:
        import onnxruntime

        self.signature = _signature(*specs)
        self._session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        names = list(self.signature.outputs)
        # ONNX strings are text.
        feed = {name: _each(array, bytes.decode) if array.dtype == object else array for name, array in inputs.items()}
        arrays = self._session.run(names, feed)
        found = {
            name: _each(array, str.encode) if array.dtype == object else array
            for name, array in zip(names, arrays, strict=True)
        }
        return {name: array.astype(NUMPY_DTYPE[self.signature.outputs[name].datatype]) for name, array in found.items()}


class BrainFloatEcho:
    """Answers bfloat16 as it came: numpy cannot hand that type to ONNX Runtime."""

    signature: ModelSignature

    def __init__(self) -> None:
        spec = TensorSpec("x", Datatype.BF16, (-1, 3))
        self.signature = _signature([spec], [TensorSpec("y", Datatype.BF16, (-1, 3))])

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {"y": inputs["x"]}


class OnnxPlane:
    """A `core.open_inference.service.DataPlane` over models by name, each in version 1."""

    def __init__(self, runnables: Mapping[str, Runnable]) -> None:
        self._runnables = runnables
        self._clock = SystemClock()

    async def is_ready(self) -> bool:
        return True

    async def index(self) -> Sequence[ModelIndexEntry]:
        return [ModelIndexEntry(name, VERSION, "READY") for name in self._runnables]

    async def metadata(self, name: str, version: str) -> ModelMetadata:
        signature = self._find(name, version).signature
        inputs, outputs = tuple(signature.inputs.values()), tuple(signature.outputs.values())
        return ModelMetadata(name, (VERSION,), "onnx_onnxv1", inputs, outputs)

    async def is_model_ready(self, name: str, version: str) -> bool:
        self._find(name, version)
        return True

    async def load(self, name: str) -> None:
        self._find(name, "")

    async def unload(self, name: str) -> None:
        raise Forbidden(f"model {name}: is always there")

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        runnable = self._find(request.model_name, request.model_version)
        runnable.signature.require(request)
        if call.deadline is not None and call.deadline.remaining_s(self._clock.monotonic_s()) <= 0:
            raise DeadlineExceeded("expected an answer before the deadline, it has passed")
        arrays = runnable.run({tensor.name: tensor.array for tensor in request.inputs})
        outputs = tuple(
            Tensor(name, runnable.signature.outputs[name].datatype, arrays[name])
            for name in runnable.signature.wanted(request)
        )
        return InferResponse(request.model_name, VERSION, outputs, id=request.id)

    def _find(self, name: str, version: str) -> Runnable:
        if name not in self._runnables or version not in ("", VERSION):
            raise UnknownModel(f"model {name[:80]!r} version {version[:80]!r}: not here")
        return self._runnables[name]


def conformance_plane() -> OnnxPlane:
    return OnnxPlane(
        {
            models.EVERYTHING: OnnxModel(models.everything(), models.everything_specs()),
            models.ARITHMETIC: OnnxModel(models.arithmetic(), models.arithmetic_specs()),
            BRAIN_FLOATS: BrainFloatEcho(),
        }
    )


@dataclass(frozen=True, slots=True)
class Faces:
    http: str
    grpc: str


@contextmanager
def running_faces(plane: OnnxPlane) -> Iterator[Faces]:
    """Serve `plane` over HTTP and gRPC on free ports, from a thread of its own."""
    started = threading.Event()
    faces: list[Faces] = []
    stops: list[Callable[[], object]] = []

    async def serve() -> None:
        loop, clock = asyncio.get_running_loop(), SystemClock()
        app = create_open_inference_app(plane, server_name="nanofleet", server_version="0.1.0", clock=clock)
        http_server = HttpServer(Address("127.0.0.1", 0))
        servicer = OpenInferenceServicer(plane, server_name="nanofleet", server_version="0.1.0", clock=clock)
        grpc_server = grpc.aio.server(options=SERVER_OPTIONS)
        add_open_inference(servicer, grpc_server)
        port = grpc_server.add_secure_port("127.0.0.1:0", TransportCredentials.local().server)
        await grpc_server.start()
        serving = asyncio.create_task(http_server.run(app))
        faces.append(Faces(str(http_server.address), f"127.0.0.1:{port}"))
        stops.append(lambda: loop.call_soon_threadsafe(http_server.stop))
        started.set()
        await serving
        await grpc_server.stop(None)
        http_server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="faces")
    thread.start()
    try:
        assert started.wait(START_TIMEOUT_S)
        yield faces[0]
    finally:
        stops[0]()
        thread.join(START_TIMEOUT_S)
        assert not thread.is_alive()


def _signature(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> ModelSignature:
    return ModelSignature({spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs})


def _each(array: Array, convert: Callable[[Any], object]) -> Array:
    converted = array.copy()
    flat = converted.reshape(-1)
    for index, element in enumerate(flat):
        flat[index] = convert(element)
    return converted
