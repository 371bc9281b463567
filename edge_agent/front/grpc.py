"""The local gRPC face: the Open Inference service and `grpc.health.v1.Health`, for programs on the same machine."""

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from core.addresses import Address
from core.clock import Clock
from core.errors import Unavailable
from core.grpc_transport import SERVER_OPTIONS, TransportCredentials
from core.metrics import Registry
from core.open_inference.grpc_face import OpenInferenceServicer, add_open_inference
from core.open_inference.service import EXTENSIONS, DataPlane, Statistics
from core.rpc_metrics import CapturedHandlers, MeasuredCalls

SERVER_NAME = "nanofleet-agent"
# What this plane adds: requests have priorities and timeouts, and are counted.
AGENT_EXTENSIONS = (*EXTENSIONS, "schedule_policy", "statistics")


class GrpcFront:
    def __init__(
        self,
        plane: DataPlane,
        *,
        bind: Address,
        credentials: TransportCredentials,
        clock: Clock,
        version: str,
        statistics: Statistics | None = None,
        metrics: Registry | None = None,
    ) -> None:
        self._bind = bind
        # No interceptor: one would cost every call more than what it measures.
        measure = None if metrics is None else MeasuredCalls(metrics, clock=clock)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        servicer = OpenInferenceServicer(
            plane,
            server_name=SERVER_NAME,
            server_version=version,
            clock=clock,
            extensions=AGENT_EXTENSIONS,
            statistics=statistics,
        )
        add_open_inference(servicer, self._server, measure=measure)
        checks = CapturedHandlers()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, checks)
        checks.register(self._server, measure)
        self._credentials = credentials

    async def start(self) -> Address:
        """Listen; return the address, whose port the system chose if the setting says 0.

        Raises:
            Unavailable: the address is taken.
        """
        try:
            port = self._server.add_secure_port(str(self._bind), self._credentials.server)
        except RuntimeError as error:
            raise Unavailable(f"gRPC face: cannot listen on {self._bind}; choose another grpc_bind") from error
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return Address(self._bind.host, port)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls and give those under way `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
