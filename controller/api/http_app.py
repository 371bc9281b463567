"""One ASGI application for the controller's HTTP port: the Open Inference face and the operator's REST side by side.

    /v2…      controller.api.open_inference_http      errors: {"error": text}
    the rest  controller.api.operator_rest (/api/…)   errors: application/problem+json
              the pages of controller.dashboard       errors: a page

Each face is an application of its own, so that none answers in the other's words. Pure ASGI: no layer here buffers
bodies or moves a request to another task.

In front of all of them stands `controller.api.access`: who asks, and whether the role suffices.
"""

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.access.service import Access
from controller.api import (
    audit_rest,
    identity_rest,
    operator_rest,
    operators_rest,
    records_rest,
    restoration_rest,
    samples_rest,
    sign_in,
)
from controller.api.access import Guarded
from controller.api.access_rules import INFERENCE_PREFIX
from controller.api.audited import Audited
from controller.api.metrics_http import Measured, metrics_router
from controller.api.notices import Noticed
from controller.api.open_inference_http import create_open_inference_app
from controller.api.operator_views import ProblemView
from controller.api.problems import exception_handlers, problem_answer
from controller.api.signing_rest import signing_router
from controller.audit.service import Audit
from controller.fleet.service import Fleet
from controller.identity.service import Identity
from controller.records.service import Records
from controller.registry.service import Registry
from controller.samples.service import SamplePulls
from controller.signing.service import Catalogue
from controller.traces.service import Traces
from core.clock import Clock
from core.metrics import Registry as Metrics
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits
from core.open_inference.service import DataPlane

TITLE = "nanofleet controller"


@dataclass(frozen=True, slots=True)
class TrustFaces:
    """What the endpoints about trust work on."""

    access: Access
    audit: Audit
    identity: Identity
    catalogue: Catalogue
    destination: identity_rest.Destination


def create_app(
    *,
    plane: DataPlane,
    registry: Registry,
    fleet: Fleet,
    traces: Traces,
    records: Records,
    pulls: SamplePulls,
    trust: TrustFaces,
    pages: APIRouter,
    clock: Clock,
    server_name: str,
    server_version: str,
    limits: BodyLimits = DEFAULT_LIMITS,
    metrics: Metrics | None = None,
) -> ASGIApp:
    """Return the application of the HTTP port; it has no start-up or shutdown of its own.

    Args:
        metrics: what `/metrics` shows; requests are measured there too.
    """
    metrics = metrics or Metrics()
    inference = create_open_inference_app(
        plane, server_name=server_name, server_version=server_version, clock=clock, limits=limits
    )
    operator = create_operator_app(
        registry=registry,
        fleet=fleet,
        traces=traces,
        records=records,
        pulls=pulls,
        trust=trust,
        pages=pages,
        clock=clock,
        server_version=server_version,
        metrics=metrics,
    )
    faces = ByPrefix(INFERENCE_PREFIX, inference, otherwise=Noticed(Audited(operator, trust.audit), fleet))
    return Measured(Guarded(faces, trust.access, trust.audit), metrics, clock=clock)


def create_operator_app(
    *,
    registry: Registry,
    fleet: Fleet,
    traces: Traces,
    records: Records,
    pulls: SamplePulls,
    trust: TrustFaces,
    pages: APIRouter,
    clock: Clock,
    server_version: str,
    metrics: Metrics | None = None,
) -> FastAPI:
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
    app.include_router(operators_rest.router(trust.access))
    app.include_router(identity_rest.router(trust.identity, trust.destination))
    app.include_router(signing_router(trust.catalogue))
    app.include_router(restoration_rest.router(fleet, trust.catalogue))
    app.include_router(records_rest.router(records, fleet, clock=clock))
    app.include_router(samples_rest.router(pulls, fleet))
    app.include_router(audit_rest.router(trust.audit))
    app.include_router(sign_in.pages(trust.access))
    app.include_router(metrics_router(metrics or Metrics()))
    app.include_router(pages)
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
