"""What tests of the heavy tier share: small models as published bytes, and the controller's side of a replica."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
from onnx import TensorProto, helper
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from controller.api.artifacts_grpc import ArtifactServicer
from core.addresses import Address
from core.digest import Digest, digest_of
from core.errors import NotFound
from core.grpc_transport import SERVER_OPTIONS
from core.manifest import Batching, File, Lineage, Manifest, Signature
from core.open_inference.messages import InferRequest
from core.spiffe import Role
from core.tensors import Datatype, Tensor
from core.tls_files import write_tls_identity
from protos.artifacts.v1.artifacts_pb2_grpc import add_ArtifactServiceServicer_to_server
from tests.support.certified import FleetAuthority

BLOCK_BYTES = 1 << 20


@dataclass
class MemoryBlobs:
    """Blobs by digest; the port `controller.api.artifacts_grpc.Blobs`."""

    contents: dict[Digest, bytes] = field(default_factory=dict)

    def add(self, content: bytes) -> Digest:
        digest = digest_of(content)
        self.contents[digest] = content
        return digest

    async def size(self, digest: Digest) -> int:
        if digest not in self.contents:
            raise NotFound(f"no blob {digest}")
        return len(self.contents[digest])

    async def open_range(self, digest: Digest, offset: int = 0) -> AsyncGenerator[bytes, None]:
        content = self.contents[digest]
        for start in range(offset, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]


def scaling_onnx(factor: float) -> bytes:
    """Return an ONNX model of `y = x * factor`, x and y `(batch, 4)` float32."""
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    graph = helper.make_graph(
        [node],
        "scaling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def publish(blobs: MemoryBlobs, onnx: bytes, *, name: str = "scaling", version: int = 1, max_batch: int = 1) -> Digest:
    """Put a model into `blobs` as the registry would; return the digest of its manifest."""
    manifest = Manifest(
        model=name,
        version=version,
        variant="original",
        entry="model.onnx",
        files=(File(path="model.onnx", digest=blobs.add(onnx), size_bytes=len(onnx)),),
        inputs=(Signature(name="x", datatype=Datatype.FP32, shape=(-1, 4)),),
        outputs=(Signature(name="y", datatype=Datatype.FP32, shape=(-1, 4)),),
        batching=Batching(max_batch=max_batch),
        lineage=Lineage(recipe="original"),
    )
    return blobs.add(manifest.to_bytes())


def scaling_request(value: float, *, name: str = "scaling", rows: int = 1) -> InferRequest:
    x = np.full((rows, 4), value, dtype=np.float32)
    return InferRequest(name, (Tensor("x", Datatype.FP32, x),))


class SpanCollector(TraceServiceServicer):
    """Keeps the spans that processes export, with the service that sent them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.arrived = asyncio.Condition()

    async def Export(  # noqa: N802 (a name of the protocol)
        self, request: ExportTraceServiceRequest, context: object
    ) -> ExportTraceServiceResponse:
        async with self.arrived:
            for resource in request.resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
            self.arrived.notify_all()
        return ExportTraceServiceResponse()

    async def wait_for(self, names: AbstractSet[str], trace_id: str, *, timeout_s: float) -> dict[str, Span]:
        """Return the spans of one trace by name, once all of `names` have come."""
        async with asyncio.timeout(timeout_s), self.arrived:
            while not names <= (found := self.of_trace(trace_id)).keys():
                await self.arrived.wait()
        return found

    def of_trace(self, trace_id: str) -> dict[str, Span]:
        return {span.name: span for _, span in self.spans if span.trace_id.hex() == trace_id}


@asynccontextmanager
async def controller_side(blobs: MemoryBlobs, collector: SpanCollector, *, tls_dir: Path) -> AsyncIterator[Address]:
    """Serve `blobs` and take spans as the controller does; whoever reads `tls_dir` is let in, as a heavy replica."""
    authority = FleetAuthority()
    write_tls_identity(tls_dir, authority.identity(Role.HEAVY))
    shown = authority.identity(Role.CONTROLLER)
    credentials = grpc.ssl_server_credentials(
        [(shown.private_key, shown.certificate_chain)], shown.trust_bundle, require_client_auth=True
    )
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_ArtifactServiceServicer_to_server(ArtifactServicer(blobs), server)
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated without types
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield Address("127.0.0.1", port)
    finally:
        await server.stop(grace=None)
