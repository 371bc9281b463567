"""One ASGI application for the controller's HTTP port: the Open Inference face and the operator's REST side by side.

    /v2…      controller.api.open_inference_http      errors: {"error": text}
    the rest  controller.api.operator_rest (/api/…)   errors: application/problem+json

Each face is an application of its own, so that none answers in the other's words. Pure ASGI: no layer here buffers
bodies or moves a request to another task.

As long as peers do not prove who they are, only requests addressed to this machine by a loopback name are answered: a
web page that points its own host name at 127.0.0.1 ("DNS rebinding") cannot reach the controller through a browser.
"""

from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.api import operator_rest
from controller.api.open_inference_http import create_open_inference_app
from controller.api.operator_views import ProblemView
from controller.api.problems import exception_handlers, problem_answer
from controller.fleet.service import Fleet
from controller.registry.service import Registry
from controller.traces.service import Traces
from core.addresses import is_loopback
from core.clock import Clock
from core.errors import Forbidden
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits
from core.open_inference.service import DataPlane
from core.status import STATUS

TITLE = "nanofleet controller"


def create_app(
    *,
    plane: DataPlane,
    registry: Registry,
    fleet: Fleet,
    traces: Traces,
    clock: Clock,
    server_name: str,
    server_version: str,
    limits: BodyLimits = DEFAULT_LIMITS,
) -> ASGIApp:
    """Return the application of the HTTP port; it has no start-up or shutdown of its own."""
    inference = create_open_inference_app(
        plane, server_name=server_name, server_version=server_version, clock=clock, limits=limits
    )
    operator = create_operator_app(registry=registry, fleet=fleet, traces=traces, server_version=server_version)
    return LoopbackOnly(ByPrefix("/v2", inference, otherwise=operator))


def create_operator_app(*, registry: Registry, fleet: Fleet, traces: Traces, server_version: str) -> FastAPI:
    app = OperatorApp(
        title=TITLE,
        version=server_version,
        openapi_url=f"{operator_rest.PREFIX}/openapi.json",
        # The documentation pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=exception_handlers(problem_answer),
        # Tracing is decided per inference request, by core.telemetry.
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.include_router(
        operator_rest.router(registry=registry, fleet=fleet, traces=traces, server_version=server_version)
    )
    return app


class OperatorApp(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI description, with the shape of refusals among its components."""
        document = super().openapi()
        document["components"]["schemas"].setdefault("ProblemView", ProblemView.model_json_schema())
        return document


class ByPrefix:
    """Sends what is below `prefix` to one application and everything else to another."""

    def __init__(self, prefix: str, app: ASGIApp, *, otherwise: ASGIApp) -> None:
        self._prefix = prefix
        self._app = app
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_below = path == self._prefix or path.startswith(f"{self._prefix}/")
        await (self._app if is_below else self._otherwise)(scope, receive, send)


class LoopbackOnly:
    """Refuses a request whose Host is not a loopback name, or that a page from elsewhere makes a browser send."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        answer = self._app if refusal is None else problem_answer(STATUS[refusal.code].http, refusal, {})
        await answer(scope, receive, send)


def _refusal(headers: Headers) -> Forbidden | None:
    if not is_loopback(_host_name(headers.get("host", ""))):
        return Forbidden("Host: expected a loopback address or localhost; other names are not served yet")
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_host_name(origin.partition("://")[2])):
        return Forbidden("Origin: expected a page from this machine; pages from elsewhere are not served")
    return None


def _host_name(host: str) -> str:
    """Return a Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
