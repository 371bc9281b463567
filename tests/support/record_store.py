"""The records of agents in memory: a full store, for tests of what stands on top of it."""

from collections.abc import Sequence
from datetime import date, datetime

from controller.records.model import (
    DayUsage,
    Event,
    EventFilter,
    HourUsage,
    Kept,
    KnownEvent,
    Per,
    UsageFilter,
)
from core.fleet_state import Usage
from core.ids import AgentId


class MemoryRecordStore:
    def __init__(self) -> None:
        self._hours: dict[tuple[AgentId, str, datetime, str], tuple[datetime, Usage]] = {}
        self._events: dict[tuple[AgentId, str], KnownEvent] = {}
        self._last_id = 0

    async def add(
        self, agent_id: AgentId, hours: Sequence[HourUsage], events: Sequence[Event], *, now: datetime, kept: Kept
    ) -> None:
        for hour in hours:
            self._add_hour(agent_id, hour, now)
        for event in events:
            self._add_event(agent_id, event, now)
        self._shed(agent_id, kept)

    def _add_hour(self, agent_id: AgentId, told: HourUsage, now: datetime) -> None:
        key = (agent_id, told.boot_id, told.hour, told.model)
        believed, known = self._hours.get(key, (told.believed_hour(now), Usage(0, 0, 0, 0)))
        usage = told.usage
        self._hours[key] = (
            believed,
            Usage(
                max(known.answered_edge, usage.answered_edge),
                max(known.answered_heavy, usage.answered_heavy),
                max(known.refused, usage.refused),
                max(known.failed, usage.failed),
            ),
        )

    def _add_event(self, agent_id: AgentId, told: Event, now: datetime) -> None:
        key = (agent_id, told.dedupe_id)
        if key not in self._events:
            self._last_id += 1
            self._events[key] = KnownEvent(
                self._last_id,
                agent_id,
                told.told.believed(now),
                now,
                told.action,
                told.target,
                told.detail,
                told.count,
            )

    def _shed(self, agent_id: AgentId, kept: Kept) -> None:
        own = sorted((found.id, key) for key, found in self._events.items() if key[0] == agent_id)
        for _, event_key in own[: max(0, len(own) - kept.max_events)]:
            del self._events[event_key]
        hours = sorted((believed, key) for key, (believed, _) in self._hours.items() if key[0] == agent_id)
        for _, hour_key in hours[: max(0, len(hours) - kept.max_hours)]:
            del self._hours[hour_key]

    async def forget(self, *, before: datetime) -> int:
        count = len(self._hours) + len(self._events)
        self._hours = {key: found for key, found in self._hours.items() if found[0] >= before}
        self._events = {key: found for key, found in self._events.items() if found.received_at >= before}
        return count - len(self._hours) - len(self._events)

    async def usage(self, wanted: UsageFilter) -> Sequence[DayUsage]:
        sums: dict[tuple[date, str, str], Usage] = {}
        for (agent, _, _, model), (believed, usage) in self._hours.items():
            day = believed.date()
            if wanted.since <= day <= wanted.until and wanted.agent in (None, agent) and wanted.model in (None, model):
                by_agent, by_model = wanted.per in {Per.AGENT, Per.BOTH}, wanted.per in {Per.MODEL, Per.BOTH}
                key = (day, agent if by_agent else "", model if by_model else "")
                known = sums.get(key, Usage(0, 0, 0, 0))
                sums[key] = Usage(
                    known.answered_edge + usage.answered_edge,
                    known.answered_heavy + usage.answered_heavy,
                    known.refused + usage.refused,
                    known.failed + usage.failed,
                )
        return [
            DayUsage(
                day,
                AgentId(agent) if wanted.per in {Per.AGENT, Per.BOTH} else None,
                model if wanted.per in {Per.MODEL, Per.BOTH} else None,
                usage,
            )
            for (day, agent, model), usage in sorted(
                sums.items(), key=lambda found: (-found[0][0].toordinal(), found[0][1:])
            )
        ][: wanted.limit]

    async def events(self, wanted: EventFilter) -> Sequence[KnownEvent]:
        found = [
            event
            for event in self._events.values()
            if event.agent_id == wanted.agent_id
            and (wanted.before is None or event.id < wanted.before)
            and (wanted.action is None or _is_of(event.action, wanted.action))
        ]
        return sorted(found, key=lambda event: -event.id)[: wanted.limit]


def _is_of(action: str, wanted: str) -> bool:
    return action.startswith(wanted) if wanted.endswith(".") else action == wanted
