"""The one gRPC port: agents, artifacts, records, Open Inference, OTLP and `grpc.health.v1`."""

from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import add_TraceServiceServicer_to_server

from controller.api.agents_grpc import FleetServicer
from controller.api.artifacts_grpc import ArtifactServicer
from controller.api.catalogue_grpc import CatalogueServicer
from controller.api.delivery_grpc import DeliveryServicer, add_delivery_to_server
from controller.api.otlp_grpc import OtlpServicer
from controller.api.records_grpc import RecordServicer
from controller.api.samples_grpc import SamplesServicer
from core.addresses import Address
from core.errors import Unavailable
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials
from core.open_inference.grpc_face import OpenInferenceServicer, add_open_inference
from protos.artifacts.v1.artifacts_pb2_grpc import add_ArtifactServiceServicer_to_server
from protos.catalogue.v1.catalogue_pb2_grpc import add_CatalogueServiceServicer_to_server
from protos.fleet.v1.fleet_pb2_grpc import add_FleetServiceServicer_to_server
from protos.records.v1.records_pb2_grpc import add_RecordServiceServicer_to_server
from protos.samples.v1.samples_pb2_grpc import add_SamplesServiceServicer_to_server

# Chosen: calls in progress beside the sessions, so that agents on their streams cannot lock everybody else out.
MAX_OTHER_CALLS = 2048
# Derived: an agent or application has one connection; some reconnect before the old one is noticed to be dead.
_MAX_OTHER_CONNECTIONS = 2048
# Derived: an agent has a session, transfers, inference and spans; an application asks much at the same time.
_MAX_CALLS_PER_CONNECTION = 512
# Chosen: slow mobile links have seconds; who does not even shake hands keeps no socket.
_HANDSHAKE_TIMEOUT_S = 20
# How long a peer may leave a keepalive ping unanswered.
_PING_TIMEOUT_S = 20
# Calls in progress may finish within it.
STOP_GRACE_S = 2.0


class GrpcServer:
    """Bound when made, so that the port is known before anything depends on it; serves between `start` and `stop`."""

    def __init__(
        self,
        bind: Address,
        credentials: TransportCredentials | grpc.ServerCredentials,
        *,
        max_sessions: int,
        keepalive_s: float,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                *SERVER_OPTIONS,
                ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
                ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_S * 1000),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_S * 1000),
                ("grpc.max_allowed_incoming_connections", max_sessions + _MAX_OTHER_CONNECTIONS),
                ("grpc.max_concurrent_streams", _MAX_CALLS_PER_CONNECTION),
            ],
            maximum_concurrent_rpcs=max_sessions + MAX_OTHER_CALLS,
        )
        self._health = health.aio.HealthServicer()
        try:
            shown = credentials.server if isinstance(credentials, TransportCredentials) else credentials
            port = self._server.add_secure_port(str(bind), shown)
        except RuntimeError as error:
            raise Unavailable(
                f"grpc_bind: cannot listen on {bind}; stop what listens there, or set grpc_bind to another port"
            ) from error
        self.address = Address(bind.host, port)

    async def start(
        self,
        *,
        fleet: FleetServicer,
        artifacts: ArtifactServicer,
        delivery: DeliveryServicer,
        catalogue: CatalogueServicer,
        records: RecordServicer,
        inference: OpenInferenceServicer,
        otlp: OtlpServicer,
        samples: SamplesServicer,
    ) -> None:
        add_FleetServiceServicer_to_server(fleet, self._server)
        add_ArtifactServiceServicer_to_server(artifacts, self._server)
        add_delivery_to_server(delivery, self._server)
        add_CatalogueServiceServicer_to_server(catalogue, self._server)
        add_RecordServiceServicer_to_server(records, self._server)
        add_SamplesServiceServicer_to_server(samples, self._server)
        add_open_inference(inference, self._server)
        # The stubs of these two come without annotations.
        add_TraceServiceServicer_to_server(otlp, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._server.start()

    async def stop(self) -> None:
        """Say so in `grpc.health.v1`, let calls finish for STOP_GRACE_S, end the rest. May be called again."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(STOP_GRACE_S)
