"""The pages: each decodes its address, asks the features, and renders. Live parts are asked for as whole pages again.

/                    overview                 /models, /models/{name}    variants and their signatures
/latency             heat map, percentiles    /audit                     who did what
/traces              list                     /dashboard/events          what changed, as it happens
/traces/{id}         waterfall                /dashboard/latency         figures of the charts
/devices             list                     /assets/{name}             scripts and styles
/devices/{id}        one device, actions
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse, Response

from controller.access.service import Access
from controller.dashboard import latency, traffic
from controller.dashboard.assets import Assets
from controller.dashboard.device_list import (
    STATES,
    Device,
    DeviceQuery,
    FleetSnapshot,
    page_of,
    snapshot_of,
)
from controller.dashboard.events import Events
from controller.dashboard.latency import LatencyView, parsed_stage, parsed_tier
from controller.dashboard.model_list import model_rows, version_rows
from controller.dashboard.overview import alerts_of
from controller.dashboard.remembered import Remembered
from controller.dashboard.render import Renderer
from controller.dashboard.sources import Sources
from controller.dashboard.waterfall import tiers_of, waterfall_of
from controller.identity.model import AgentIdentity
from controller.traces.columns import SpanColumns, Which
from controller.traces.stages import STAGES, TierName
from core.errors import InvalidRequest, NanofleetError, UnknownAgent
from core.ids import AgentId, ModelName
from core.status import STATUS

# Chosen: while agents report all the time, the fleet is looked at this often, however many people look.
SNAPSHOT_PAUSE_S = 1.0
# Chosen: what nobody announces, such as a ban that was lifted from a device that is away, is seen within it.
SNAPSHOT_MAX_AGE_S = 30.0
MAX_TRACES = 50

Word = Annotated[str, Query(max_length=256)]
Microseconds = Annotated[int | None, Query(ge=0, le=1 << 53)]
Handler: TypeAlias = Callable[[Request], Coroutine[Any, Any, Response]]


class Dashboard:
    """Every page; `router` has them. Keep `run` running in a task of the owner."""

    def __init__(self, sources: Sources, access: Access, *, version: str) -> None:
        self._sources = sources
        self._assets = Assets()
        self._renderer = Renderer(self._assets, clock=sources.clock, version=version)
        fleet, traces = sources.fleet, sources.traces
        self._fleet = Remembered(
            self._snapshot,
            version=lambda: fleet.revision,
            clock=sources.clock,
            pause_s=SNAPSHOT_PAUSE_S,
            max_age_s=SNAPSHOT_MAX_AGE_S,
        )
        # Open pages are told when what they will be shown has changed, not before.
        self._events = Events(access, fleet=self._fleet.look, traces=lambda: traces.revision)

    async def run(self) -> None:
        """Keep what the pages show of the fleet up to date while somebody looks, for ever."""
        await self._fleet.run()

    def end(self) -> None:
        """End what is streamed: the controller stops."""
        self._events.end()

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False, route_class=_page_route(self._renderer))
        for path, endpoint in (
            ("/", self.overview),
            ("/latency", self.latency),
            ("/traces", self.traces),
            ("/traces/{trace_id}", self.trace),
            ("/devices", self.devices),
            ("/devices/{agent_id}", self.device),
            ("/models", self.models),
            ("/models/{name}", self.model),
            ("/audit", self.audit),
        ):
            router.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        for path, other in (
            ("/dashboard/events", self._events.stream),
            ("/dashboard/latency", self.latency_figures),
            ("/assets/{name}", self._assets.serve),
        ):
            router.add_api_route(path, other, methods=["GET"], response_model=None, route_class_override=APIRoute)
        return router

    # ---- the fleet -----------------------------------------------------------------------------------------------

    async def overview(self, request: Request) -> Response:
        now_us = self._now_us()
        fleet, signing, seen = await asyncio.gather(
            self._fleet.get(),
            self._sources.signing.status(),
            self._sources.statistics.ask(lambda columns: traffic.traffic_of(columns, now_us)),
        )
        now = self._sources.clock.now()
        return self._renderer.page(
            request,
            "overview.html",
            fleet=fleet,
            alerts=alerts_of(fleet, signing, self._sources.fleet.restoration, now=now),
            counted=traffic.counted_of(fleet.devices),
            traffic=seen,
            window_s=traffic.WINDOW_S,
        )

    async def devices(
        self,
        request: Request,
        q: Word = "",
        site: Word = "",
        state: Word = "",
        page: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
    ) -> Response:
        fleet = await self._fleet.get()
        query = DeviceQuery.parsed(text=q, site=site, state=state, page=page)
        return self._renderer.page(
            request, "devices.html", fleet=fleet, query=query, found=page_of(fleet, query), states=STATES
        )

    async def device(self, request: Request, agent_id: str) -> Response:
        view = await self._sources.fleet.agent(AgentId(agent_id))
        device = Device(view, await self._identity(AgentId(agent_id)))
        deployments = [
            deployment
            for deployment in await self._sources.fleet.deployments()
            if deployment.target.covers(device.id, device.site)
        ]
        return self._renderer.page(request, "device.html", device=device, deployments=deployments)

    async def _identity(self, agent_id: AgentId) -> AgentIdentity | None:
        try:
            return await self._sources.identities.identity(agent_id)
        except UnknownAgent:
            return None

    async def _snapshot(self) -> FleetSnapshot:
        views, identities = await asyncio.gather(self._sources.fleet.agents(), self._sources.identities.identities())
        return await asyncio.to_thread(snapshot_of, views, identities)

    # ---- models --------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        known = [await self._sources.registry.latest(model.name) for model in await self._sources.registry.models()]
        signing, deployments = await asyncio.gather(self._sources.signing.status(), self._sources.fleet.deployments())
        rows = model_rows(known, deployments, self._sources.signing, signing)
        return self._renderer.page(request, "models.html", rows=rows, signing=signing)

    async def model(self, request: Request, name: str) -> Response:
        versions, signing = await asyncio.gather(
            self._sources.registry.versions(ModelName(name)), self._sources.signing.status()
        )
        rows = version_rows(versions, self._sources.signing, signing)
        return self._renderer.page(request, "model.html", name=name, versions=rows)

    # ---- requests ------------------------------------------------------------------------------------------------

    async def latency(
        self,
        request: Request,
        range: Word = "",  # noqa: A002  (the word in the address)
        stage: Word = "",
        tier: Word = "",
        model: Word = "",
        site: Word = "",
    ) -> Response:
        view = LatencyView.parsed(range_=range, stage=stage, tier=tier, model=model, site=site)
        which = view.which(self._now_us())
        report = await self._sources.statistics.ask(lambda columns: latency.report_of(columns, which))
        return self._renderer.page(
            request,
            "latency.html",
            has_charts=True,
            view=view,
            report=report,
            ranges=latency.RANGES,
            tiers=list(TierName),
            stage_word=latency.stage_word,
        )

    async def latency_figures(
        self,
        range: Word = "",  # noqa: A002  (the word in the address)
        stage: Word = "",
        tier: Word = "",
        model: Word = "",
        site: Word = "",
    ) -> Response:
        view = LatencyView.parsed(range_=range, stage=stage, tier=tier, model=model, site=site)
        which = view.which(self._now_us())
        figures = await self._sources.statistics.ask(lambda columns: latency.figures_of(columns, which, view.stage))
        return JSONResponse(figures)

    async def traces(
        self,
        request: Request,
        stage: Word = "",
        tier: Word = "",
        model: Word = "",
        site: Word = "",
        from_us: Microseconds = None,
        until_us: Microseconds = None,
        at_least_us: Annotated[int, Query(ge=0, le=1 << 53)] = 0,
        below_us: Microseconds = None,
    ) -> Response:
        until = self._now_us() + 1 if until_us is None else until_us
        which = Which(from_us or 0, until, model or None, site or None, parsed_tier(tier), parsed_stage(stage))

        def find(columns: SpanColumns) -> tuple[list[str], list[str], list[str]]:
            ids = columns.trace_ids(which, limit=MAX_TRACES, at_least_us=at_least_us, below_us=below_us)
            return ids, columns.models, columns.sites

        ids, models, sites = await self._sources.statistics.ask(find)
        return self._renderer.page(
            request,
            "traces.html",
            which=which,
            is_part=from_us is not None or until_us is not None,
            at_least_us=at_least_us,
            below_us=below_us,
            traces=await self._sources.traces.summaries(ids),
            models=models,
            sites=sites,
            tiers=list(TierName),
            stages=STAGES,
            stage_word=latency.stage_word,
            tiers_of=tiers_of,
            limit=MAX_TRACES,
        )

    async def trace(self, request: Request, trace_id: str) -> Response:
        spans = await self._sources.traces.trace(trace_id)
        return self._renderer.page(request, "trace.html", trace_id=trace_id, waterfall=waterfall_of(spans))

    async def audit(self, request: Request) -> Response:
        return self._renderer.page(request, "audit.html")

    def _now_us(self) -> int:
        return int(self._sources.clock.now().timestamp() * 1e6)


def _page_route(renderer: Renderer) -> type[APIRoute]:
    """Return the route of pages: what is refused is a page too, that says why and where to go from there."""

    class PageRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def handle_page(request: Request) -> Response:
                try:
                    return await handle(request)
                except RequestValidationError:
                    words = "the address of this page: expected what its own links say; go back and choose again"
                    return refused(request, InvalidRequest(words))
                except NanofleetError as error:
                    return refused(request, error)

            return handle_page

    def refused(request: Request, error: NanofleetError) -> Response:
        status = STATUS[error.code].http
        return renderer.page(request, "error.html", status=status, reason=str(error), code=status)

    return PageRoute
