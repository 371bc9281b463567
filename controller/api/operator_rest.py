"""The operator's REST: blobs, models, agents, deployments, traces. The command line and the dashboard live on it.

Endpoints decode, call one feature, and encode; shapes are in `operator_views`. Whatever a feature refuses becomes
problem details (RFC 9457) in `problems`. Progress is watched by long polls: `GET /api/publications/{id}` and
`GET /api/agents` answer when something changed, or after `wait_s`.
"""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.routing import APIRoute

from controller.api import audited
from controller.api import operator_views as views
from controller.api.http_bodies import BoundedRoute
from controller.api.operator_mapping import (
    agent_view,
    deployed_view,
    deployment_view,
    model_view,
    publication_view,
    slot_view,
    span_view,
    to_publish_request,
    trace_summary_view,
    version_view,
)
from controller.fleet.model import Target, TargetKind
from controller.fleet.service import Fleet
from controller.registry.service import Registry
from controller.traces.model import TraceFilter
from controller.traces.service import Traces
from core.digest import parse_digest
from core.errors import IntegrityError, InvalidRequest
from core.ids import AgentId, ModelName, VariantName

PREFIX = "/api"
# Chosen: below the idle time-outs of common proxies.
MAX_WAIT_S = 10.0

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}

WaitS = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for a change; 0 answers at once.")]
ServiceName = Annotated[str | None, Query(max_length=256, description="Only traces with a span of this service.")]
TraceModel = Annotated[str | None, Query(max_length=256, description="Only traces with a span about this model.")]


def router(*, registry: Registry, fleet: Fleet, traces: Traces, server_version: str) -> APIRouter:
    """Return every endpoint, below /api."""
    # "default" also keeps the framework from documenting a 422 that is never answered.
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute)
    _health(api, server_version, fleet)
    _Models(registry).add_to(api)
    _Agents(fleet).add_to(api)
    _Traces(traces).add_to(api)
    return api


def _health(api: APIRouter, server_version: str, fleet: Fleet) -> None:
    async def health() -> views.HealthView:
        return views.HealthView(version=server_version, is_restored_unconfirmed=fleet.is_watching)

    api.add_api_route("/health", health, tags=["health"], summary="Say that the controller answers")


class _Models:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def add_to(self, api: APIRouter) -> None:
        api.add_api_route(
            "/blobs/{digest}",
            self.put_blob,
            methods=["PUT"],
            status_code=201,
            # Its bound is the registry's.
            route_class_override=APIRoute,
            tags=["models"],
            summary="Upload bytes under their digest",
            responses={200: {"description": "They were here already.", "model": views.BlobView}, **_problems(413)},
            openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
        )
        api.add_api_route(
            "/blobs/{digest}",
            self.head_blob,
            methods=["HEAD"],
            tags=["models"],
            summary="Ask whether bytes are here",
            response_class=Response,
            responses={404: {"description": "They are not."}},
        )
        api.add_api_route(
            "/models/{name}/versions",
            self.publish,
            methods=["POST"],
            status_code=202,
            tags=["models"],
            summary="Publish a model from uploaded blobs",
            responses=_problems(404, 413, 429),
        )
        api.add_api_route(
            "/publications/{publication_id}",
            self.publication,
            tags=["models"],
            summary="Say how a publish stands",
            responses=_problems(404),
        )
        api.add_api_route("/models", self.models, tags=["models"], summary="List the models")
        api.add_api_route(
            "/models/{name}",
            self.model,
            tags=["models"],
            summary="Show a model with its versions and variants",
            responses=_problems(404),
        )

    async def put_blob(self, digest: str, request: Request, response: Response) -> views.BlobView:
        checked = parse_digest(digest)
        try:
            is_new = await self._registry.put_blob(checked, request.stream())
        except IntegrityError as error:
            raise InvalidRequest("body: its bytes have another digest than the path says; send them again") from error
        response.status_code = 201 if is_new else 200
        return views.BlobView(digest=checked, size_bytes=await self._registry.blob_size(checked))

    async def head_blob(self, digest: str) -> Response:
        size_bytes = await self._registry.blob_size(parse_digest(digest))
        return Response(headers={"content-length": str(size_bytes)}, media_type="application/octet-stream")

    async def publish(
        self, name: str, body: views.PublishBody, request: Request, response: Response
    ) -> views.PublicationView:
        publication = await self._registry.start_publication(ModelName(name), to_publish_request(body))
        audited.add(request, detail=f"publication {publication.id}")
        response.headers["location"] = f"{PREFIX}/publications/{publication.id}"
        return publication_view(publication)

    async def publication(
        self, publication_id: str, wait_s: WaitS = 0.0, seen_at: datetime | None = None
    ) -> views.PublicationView:
        """With `wait_s`, wait until `updated_at` is no longer `seen_at`."""
        found = await self._registry.publication(publication_id)
        if wait_s and not found.is_over and seen_at in (None, found.updated_at):
            found = await self._registry.next_change(found, timeout_s=wait_s)
        return publication_view(found)

    async def models(self) -> views.ModelsView:
        return views.ModelsView(models=tuple(map(model_view, await self._registry.models())))

    async def model(self, name: str) -> views.ModelDetailView:
        versions = await self._registry.versions(ModelName(name))
        return views.ModelDetailView(name=name, versions=tuple(map(version_view, versions)))


class _Agents:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def add_to(self, api: APIRouter) -> None:
        api.add_api_route("/agents", self.agents, tags=["fleet"], summary="List the agents, or wait for a change")
        api.add_api_route(
            "/agents/{agent_id}", self.agent, tags=["fleet"], summary="Show an agent", responses=_problems(404)
        )
        api.add_api_route(
            "/agents/{agent_id}/transfers",
            self.permit_transfer,
            methods=["POST"],
            tags=["fleet"],
            summary="Let a metered agent fetch whole chunks of a model",
            responses=_problems(404),
        )
        api.add_api_route("/deployments", self.deployments, tags=["fleet"], summary="List what shall run where")
        api.add_api_route(
            "/deployments",
            self.deploy,
            methods=["PUT"],
            tags=["fleet"],
            summary="Let a site, an agent or the fleet run a variant",
            responses=_problems(404, 409),
        )

    async def agents(self, wait_s: WaitS = 0.0, after: int | None = None) -> views.AgentsView:
        """With `wait_s`, wait until `revision` is no longer `after`."""
        # Read before the agents: what changes in between is seen again, not missed.
        revision = self._fleet.revision
        if wait_s and after in (None, revision):
            revision = await self._fleet.next_change(revision, timeout_s=wait_s)
        return views.AgentsView(revision=revision, agents=tuple(map(agent_view, await self._fleet.agents())))

    async def agent(self, agent_id: str) -> views.AgentView:
        return agent_view(await self._fleet.agent(AgentId(agent_id)))

    async def permit_transfer(self, agent_id: str, body: views.TransferBody, request: Request) -> views.SlotView:
        """Return what it may now fetch: the variant of the model that it shall run."""
        await audited.describe(request, detail=f"model {body.model}")
        return slot_view(await self._fleet.permit_transfer(AgentId(agent_id), ModelName(body.model)))

    async def deployments(self) -> views.DeploymentsView:
        return views.DeploymentsView(deployments=tuple(map(deployment_view, await self._fleet.deployments())))

    async def deploy(self, body: views.DeploymentBody, request: Request) -> views.DeployedView:
        target = Target.checked(TargetKind(body.target_kind), body.target)
        wanted = f"{body.model} {'newest' if body.version is None else body.version} {body.variant}"
        await audited.describe(request, target=f"{target.kind} {target.name}".strip(), detail=wanted)
        deployed = await self._fleet.deploy(
            target, model=ModelName(body.model), version=body.version, variant=VariantName(body.variant)
        )
        slot = deployed.deployment.slot
        audited.add(request, detail=f"{slot.model} {slot.version} {slot.variant}, agents: {len(deployed.agents)}")
        return deployed_view(deployed)


class _Traces:
    def __init__(self, traces: Traces) -> None:
        self._traces = traces

    def add_to(self, api: APIRouter) -> None:
        api.add_api_route("/traces", self.recent, tags=["traces"], summary="List the recent traces")
        api.add_api_route(
            "/traces/{trace_id}",
            self.trace,
            tags=["traces"],
            summary="Show every span of a trace",
            responses=_problems(404),
        )

    async def recent(
        self,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        service: ServiceName = None,
        model: TraceModel = None,
    ) -> views.TracesView:
        found = await self._traces.recent(TraceFilter(limit=limit, service=service, model=model))
        return views.TracesView(traces=tuple(map(trace_summary_view, found)))

    async def trace(self, trace_id: str) -> views.TraceView:
        spans = await self._traces.trace(trace_id)
        return views.TraceView(trace_id=trace_id, spans=tuple(map(span_view, spans)))


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of refusals with these statuses."""
    return dict.fromkeys(statuses, _REFUSED)
