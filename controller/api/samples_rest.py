"""The operator's REST for hard examples: who keeps how many, and pulling them.

Counts are for everybody who may look. The samples themselves are what devices sent: to pull, see or fetch them takes
the role of an operator, and each pull is recorded.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from controller.access.model import Caller
from controller.api import audited
from controller.api import sample_views as views
from controller.api.http_bodies import BoundedRoute
from controller.api.operator_rest import PREFIX, WaitS
from controller.fleet.service import Fleet
from controller.samples.model import Delivery, PullRequest, PullView
from controller.samples.service import SamplePulls
from core.digest import parse_digest
from core.errors import InvalidRequest
from core.ids import AgentId, ModelName, SiteId, checked_name

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}
Start = Annotated[int, Query(ge=0, le=1 << 31, description="Leave out so many of the samples.")]
_NPZ: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def router(pulls: SamplePulls, fleet: Fleet) -> APIRouter:
    """Return the endpoints about hard examples, below /api."""
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute, tags=["samples"])
    face = _Samples(pulls, fleet)
    api.add_api_route("/samples", face.counts, summary="Say how many hard examples agents keep")
    api.add_api_route(
        "/models/{name}/sample-pulls",
        face.create,
        methods=["POST"],
        status_code=201,
        summary="Ask agents for their hard examples of a model",
        responses={404: _REFUSED, 429: _REFUSED},
    )
    api.add_api_route("/sample-pulls", face.pulls, summary="List the pulls that are not over")
    api.add_api_route(
        "/sample-pulls/{pull_id}",
        face.pull,
        summary="Say what came for a pull, or wait for more",
        responses={404: _REFUSED},
    )
    api.add_api_route(
        "/sample-pulls/{pull_id}",
        face.drop,
        methods=["DELETE"],
        status_code=204,
        summary="End a pull and remove what came for it",
        responses={404: _REFUSED},
    )
    api.add_api_route(
        "/sample-pulls/{pull_id}/samples/{agent_id}/{digest}",
        face.content,
        summary="Fetch a sample",
        response_class=Response,
        responses={200: {"description": "An `.npz`.", "content": _NPZ}, 404: _REFUSED},
    )
    return api


class _Samples:
    def __init__(self, pulls: SamplePulls, fleet: Fleet) -> None:
        self._pulls = pulls
        self._fleet = fleet

    async def counts(self) -> views.SampleCountsView:
        counts = self._pulls.counts()
        rows = tuple(
            views.SampleCountView(agent=agent_id, is_online=self._fleet.is_online(agent_id), **row._asdict())
            for agent_id, each in sorted(counts.items())
            for row in each.rows
        )
        other, size_bytes = (sum(each.other for each in counts.values()), sum(c.size_bytes for c in counts.values()))
        return views.SampleCountsView(counts=rows, other=other, size_bytes=size_bytes)

    async def create(self, name: str, body: views.PullBody, request: Request) -> views.SamplePullView:
        if body.agents and body.site is not None:
            raise InvalidRequest("pull: expected agents or a site, got both")
        where = ", ".join(body.agents) or (f"site {body.site}" if body.site else "the fleet")
        await audited.describe(request, detail=f"from {where}, at most {body.limit} each")
        wanted = PullRequest(
            ModelName(checked_name(name, kind="model")),
            body.limit,
            body.lifetime_s,
            tuple(AgentId(agent) for agent in dict.fromkeys(body.agents)),
            None if body.site is None else SiteId(body.site),
            body.since,
            permits_metered=body.allow_metered,
        )
        created = await self._pulls.create(wanted, asked_by=_name_of_caller(request))
        audited.add(request, detail=f"from {where}, at most {body.limit} each, pull {created.pull.pull_id}")
        return self._view(created)

    async def pulls(self) -> views.SamplePullsView:
        return views.SamplePullsView(pulls=tuple(map(self._view, self._pulls.pulls())))

    async def pull(
        self, pull_id: str, wait_s: WaitS = 0.0, after: int | None = None, start: Start = 0
    ) -> views.SamplePullDetailView:
        """With `wait_s`, wait until `revision` is no longer `after`."""
        # Read before the pull: what changes in between is seen again, not missed.
        revision = self._pulls.revision
        self._pulls.pull(pull_id)
        if wait_s and after in (None, revision):
            revision = await self._pulls.next_change(revision, timeout_s=wait_s)
        found = self._pulls.pull(pull_id)
        samples = tuple(
            views.PulledSampleView(agent=each.agent_id, digest=each.digest, size_bytes=each.size_bytes)
            for each in self._pulls.samples(pull_id, start=start, limit=views.MAX_PAGE)
        )
        return views.SamplePullDetailView(revision=revision, pull=self._view(found), samples=samples)

    async def drop(self, pull_id: str) -> Response:
        await self._pulls.drop(pull_id)
        return Response(status_code=204)

    async def content(self, pull_id: str, agent_id: str, digest: str) -> Response:
        content = await self._pulls.content(pull_id, AgentId(agent_id), parse_digest(digest))
        return Response(content, media_type="application/octet-stream")

    def _view(self, found: PullView) -> views.SamplePullView:
        pull = found.pull
        return views.SamplePullView(
            id=pull.pull_id,
            model=pull.model,
            limit=pull.limit,
            since=pull.since,
            allow_metered=pull.permits_metered,
            asked_by=pull.asked_by,
            created_at=pull.created_at,
            expires_at=pull.expires_at,
            deliveries=tuple(self._delivery_view(*item) for item in found.deliveries.items()),
        )

    def _delivery_view(self, agent_id: AgentId, delivery: Delivery) -> views.DeliveryView:
        return views.DeliveryView(
            agent=agent_id,
            is_online=self._fleet.is_online(agent_id),
            state=delivery.state.value,
            reason=delivery.reason,
            offered=delivery.offered,
            samples=len(delivery.samples),
            size_bytes=delivery.size_bytes,
        )


def _name_of_caller(request: Request) -> str:
    """Return who asks; empty where the application stands alone, without the gate in front of it."""
    caller = request.scope.get("state", {}).get("caller")
    return caller.operator.name if isinstance(caller, Caller) else ""
