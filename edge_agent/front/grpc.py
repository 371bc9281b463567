"""The agent's own gRPC face: the Open Inference service and `grpc.health.v1.Health`, for programs beside it."""

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from core.addresses import Address
from core.clock import Clock
from core.errors import NanofleetError, Unavailable
from core.grpc_transport import SERVER_OPTIONS
from core.metrics import Registry
from core.open_inference.grpc_face import OpenInferenceServicer, add_open_inference
from core.open_inference.service import EXTENSIONS, DataPlane, Statistics
from core.rpc_metrics import CapturedHandlers, Context, Handler, MeasuredCalls
from core.status import STATUS

CallerOf = Callable[[Iterable[str]], str]
_URIS = "peer_spiffe_id", "x509_uri"


class GrpcFront:
    def __init__(
        self,
        plane: DataPlane,
        *,
        bind: Address,
        credentials: grpc.ServerCredentials,
        clock: Clock,
        version: str,
        name: str = "nanofleet-agent",
        extensions: Sequence[str] = EXTENSIONS,
        caller_of: CallerOf | None = None,
        statistics: Statistics | None = None,
        metrics: Registry | None = None,
    ) -> None:
        """`caller_of` tells who calls by the URIs of a certificate, or raises; None: callers show none."""
        self._bind = bind
        self._credentials = credentials
        # No interceptor: one would cost every call more than what it measures.
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        callers = None if caller_of is None else _Callers(caller_of)
        servicer = OpenInferenceServicer(
            plane,
            server_name=name,
            server_version=version,
            clock=clock,
            extensions=extensions,
            statistics=statistics,
            client_of=None if callers is None else callers.name_of,
        )
        captured = CapturedHandlers()
        add_open_inference(servicer, captured)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, captured)
        if callers is not None:
            captured.wrap(callers.guarded)
        if metrics is not None:
            captured.wrap(MeasuredCalls(metrics, clock=clock).measured)
        captured.register(self._server)

    async def start(self) -> Address:
        """Listen; return the address, whose port the system chose if the setting says 0.

        Raises:
            Unavailable: the address is taken.
        """
        try:
            port = self._server.add_secure_port(str(self._bind), self._credentials)
        except RuntimeError as error:
            raise Unavailable(f"gRPC face: cannot listen on {self._bind}; choose another grpc_bind") from error
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return Address(self._bind.host, port)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls and give those under way `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class _Callers:
    """Lets in whom the certificate says may ask."""

    def __init__(self, caller_of: CallerOf) -> None:
        self._caller_of = caller_of

    def name_of(self, context: Context) -> str:
        found = context.auth_context()
        # Absent where there is no such name; the first key is there when a certificate has one SPIFFE id.
        uris = found.get(_URIS[0]) or found.get(_URIS[1]) or ()
        return self._caller_of([uri.decode("utf-8", "replace") for uri in uris])

    def guarded(self, handler: Handler, _method: str) -> Handler:
        # The stubs of a handler have all four kinds, of which one is set.
        kinds: Any = handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(kinds.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._call(kinds.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def _call(self, behaviour: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def guarded(request: object, context: Context) -> object:
            await self._require(context)
            return await behaviour(request, context)

        return guarded

    def _stream(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def iterated(request: object, context: Context) -> AsyncGenerator[object, None]:
                await self._require(context)
                async for answer in behaviour(request, context):
                    yield answer

            return iterated
        return self._call(behaviour)

    async def _require(self, context: Context) -> None:
        try:
            self.name_of(context)
        except NanofleetError as error:
            await context.abort(STATUS[error.code].grpc, str(error))
