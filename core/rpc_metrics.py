"""`rpc.server.call.duration` of the conventions, for every call of a grpc.aio server: an interceptor.

The first of a server's interceptors, so that refusals by those behind it are measured too. A call that lasts, such as a
session, is measured when it ends. Methods that nobody serves are not: their names are the peer's invention.
"""

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import grpc.aio

from core.clock import Clock
from core.metrics import CALL_BUCKETS_S, Registry

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class MeasuredCalls(grpc.aio.ServerInterceptor):
    def __init__(self, registry: Registry, *, clock: Clock) -> None:
        self._clock = clock
        self._durations = registry.histogram(
            "rpc_server_call_duration_seconds",
            "From the start of a gRPC call to its end.",
            ("rpc_system_name", "rpc_method", "rpc_response_status_code"),
            bounds=CALL_BUCKETS_S,
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        return None if handler is None else self.measured(handler, handler_call_details.method)

    def measured(self, handler: Handler, method: str) -> Handler:
        """Return `handler`, measured: what a server without interceptors registers, which is cheaper."""
        kind = f"{_word(handler.request_streaming)}_{_word(handler.response_streaming)}"
        behaviour = getattr(handler, kind)
        measure = self._stream if inspect.isasyncgenfunction(behaviour) else self._call
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        measured: Handler = make(
            measure(behaviour, method.lstrip("/")),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return measured

    def _call(self, behaviour: Callable[..., Awaitable[object]], method: str) -> Callable[..., Awaitable[object]]:
        async def measured(request: object, context: Context) -> object:
            started_s = self._clock.monotonic_s()
            error: BaseException | None = None
            try:
                return await behaviour(request, context)
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._note(method, context, error, started_s)
                # Its traceback holds this frame.
                del error

        return measured

    def _stream(
        self, behaviour: Callable[..., AsyncGenerator[object, None]], method: str
    ) -> Callable[..., AsyncGenerator[object, None]]:
        async def measured(request: object, context: Context) -> AsyncGenerator[object, None]:
            started_s = self._clock.monotonic_s()
            error: BaseException | None = None
            try:
                async with aclosing(behaviour(request, context)) as answers:
                    async for answer in answers:
                        yield answer
            except BaseException as raised:
                error = raised
                raise
            finally:
                self._note(method, context, error, started_s)
                # Its traceback holds this frame.
                del error

        return measured

    def _note(self, method: str, context: Context, error: BaseException | None, started_s: float) -> None:
        duration_s = self._clock.monotonic_s() - started_s
        self._durations.of("grpc", method, _code(context, error)).observe(duration_s)


def _code(context: Context, error: BaseException | None) -> str:
    """Return the status of a call as gRPC will tell its peer."""
    # gRPC keeps a number or a member, whichever was set, and None or 0 until then: OK, unless something was raised.
    kept: object = context.code()
    number = kept.value[0] if isinstance(kept, grpc.StatusCode) else kept or 0
    if number or error is None:
        return _NAMES.get(number, "UNKNOWN") if isinstance(number, int) else "UNKNOWN"
    # The peer left, or a servicer failed by a defect, which gRPC answers with UNKNOWN.
    return "UNKNOWN" if isinstance(error, Exception) else "CANCELLED"


def _word(is_streaming: bool) -> str:
    return "stream" if is_streaming else "unary"


class CapturedHandlers:
    """Stands for a server where generated code registers a servicer, so that its handlers can be had one by one."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, Handler]] = {}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[object]) -> None:
        """Leave them: the same methods are registered by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        self.services.setdefault(service, {}).update(handlers)

    def wrap(self, wrapped: Callable[[Handler, str], Handler]) -> None:
        """Put `wrapped`, of a handler and its method's name, in the place of each."""
        for service, handlers in self.services.items():
            self.services[service] = {name: wrapped(each, f"{service}/{name}") for name, each in handlers.items()}

    def register(self, server: grpc.aio.Server) -> None:
        """Register all of them, by generic handlers alone.

        A server of grpc.aio waits for each method that is registered by name with a task of its own, and goes through
        all of these tasks twice a call: with a dozen methods 3 % of what a call costs (measured).
        """
        handlers = [grpc.method_handlers_generic_handler(service, each) for service, each in self.services.items()]
        server.add_generic_rpc_handlers(handlers)
