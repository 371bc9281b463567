"""The operator's REST for what agents write down: usage by day, and what happened to an agent."""

from datetime import date, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query

from controller.api import records_views as views
from controller.api.http_bodies import BoundedRoute
from controller.fleet.service import Fleet
from controller.records.model import DayUsage, EventFilter, KnownEvent, Per, UsageFilter
from controller.records.service import Records
from core.clock import Clock
from core.errors import InvalidRequest
from core.ids import AgentId

PREFIX = "/api"
# Derived: SQLite's integers have 64 bits.
_MAX_ID = (1 << 63) - 1
# Chosen: a month, unless somebody says more.
_DAYS = timedelta(days=30)

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}

ActionText = Annotated[
    str | None, Query(max_length=64, description="An action; with a dot at its end, all that begin so.")
]
NameText = Annotated[str | None, Query(max_length=64)]
DayText = Annotated[date | None, Query(description="In UTC.", ge=date(1970, 1, 2), le=date(9998, 12, 31))]


def router(records: Records, fleet: Fleet, *, clock: Clock) -> APIRouter:
    """Return the endpoints about agents' records, below /api."""
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute, tags=["records"])
    face = _Records(records, fleet, clock)
    api.add_api_route("/usage", face.usage, summary="Sum up by day what became of requests to agents")
    api.add_api_route("/agents/{agent_id}/events", face.events, summary="List what happened to an agent")
    return api


class _Records:
    def __init__(self, records: Records, fleet: Fleet, clock: Clock) -> None:
        self._records = records
        self._fleet = fleet
        self._clock = clock

    async def usage(
        self,
        since: DayText = None,
        until: DayText = None,
        per: views.PerText = "model",
        agent: NameText = None,
        model: NameText = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> views.UsageReportView:
        """Days are in UTC; without `since` the last thirty. What an agent has not sent yet is missing."""
        last = until or self._clock.now().date()
        first = since or last - _DAYS
        if first > last:
            raise InvalidRequest(f"usage: expected since to be no later than until, got {first} and {last}")
        of = None if agent is None else AgentId(agent)
        found = await self._records.usage(UsageFilter(first, last, Per(per), of, model, limit))
        return views.UsageReportView(days=tuple(map(_day_view, found)))

    async def events(
        self,
        agent_id: str,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
        before: Annotated[int | None, Query(ge=1, le=_MAX_ID)] = None,
        action: ActionText = None,
    ) -> views.AgentEventsView:
        # An agent that nobody knows is not found, as everywhere.
        agent = (await self._fleet.agent(AgentId(agent_id))).agent.agent_id
        page = await self._records.events(EventFilter(agent, limit, before, action))
        return views.AgentEventsView(events=tuple(map(_event_view, page.events)), next=page.next_before)


def _day_view(found: DayUsage) -> views.DayUsageView:
    usage = found.usage
    return views.DayUsageView(
        day=found.day,
        agent=found.agent_id,
        model=found.model,
        answered_edge=usage.answered_edge,
        answered_heavy=usage.answered_heavy,
        refused=usage.refused,
        failed=usage.failed,
    )


def _event_view(event: KnownEvent) -> views.AgentEventView:
    return views.AgentEventView(
        id=event.id,
        at=event.at,
        received_at=event.received_at,
        action=event.action,
        target=event.target,
        detail=event.detail,
        count=event.count,
    )
