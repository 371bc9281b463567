"""`Records`: takes in what agents write down, and gives it out to operators."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from controller.records.model import DayUsage, Event, EventFilter, HourUsage, Kept, KnownEvent, UsageFilter
from controller.records.store import RecordStore
from core.clock import Clock
from core.errors import Overloaded
from core.ids import AgentId

# Chosen: batches under way at one time. A fleet that comes back sends thousands; the database takes them one by one.
MAX_APPENDING = 32
# Chosen: who is sent away comes back when some hundred batches are through.
RETRY_AFTER_S = 10.0
_TIDY_INTERVAL_S = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EventPage:
    """`next_before` is None on the last page."""

    events: Sequence[KnownEvent]
    next_before: int | None


class Records:
    """Keep `run` running: it lets go of what is too old."""

    def __init__(self, store: RecordStore, *, clock: Clock, kept: Kept) -> None:
        self._store = store
        self._clock = clock
        self._kept = kept
        self._appending = 0
        # Since the process began, by what became of them.
        self.taken = self.refused = self.turned_away = 0

    async def append(self, agent_id: AgentId, hours: Sequence[HourUsage], events: Sequence[Event]) -> None:
        """Take in what one agent tells; durable on return, and the same when it is told again.

        Raises:
            Overloaded: too many agents tell at the same time.
            Unavailable: the database is away.
        """
        if self._appending >= MAX_APPENDING:
            self.turned_away += 1
            raise Overloaded(f"records: {MAX_APPENDING} batches are under way; try again later").after(RETRY_AFTER_S)
        self._appending += 1
        try:
            await self._store.add(agent_id, hours, events, now=self._clock.now(), kept=self._kept)
        finally:
            self._appending -= 1
        self.taken += len(hours) + len(events)

    def note_refused(self, count: int) -> None:
        """Count records that have no meaning here."""
        self.refused += count

    async def run(self) -> None:
        while True:
            await self.tidy()
            await asyncio.sleep(_TIDY_INTERVAL_S)

    async def tidy(self) -> None:
        """Let go of what is older than the bound."""
        if removed := await self._store.forget(before=self._clock.now() - self._kept.kept_for):
            _log.info("records beyond the bound removed", extra={"records": removed})

    async def usage(self, wanted: UsageFilter) -> Sequence[DayUsage]:
        return await self._store.usage(wanted)

    async def events(self, wanted: EventFilter) -> EventPage:
        found = await self._store.events(replace(wanted, limit=wanted.limit + 1))
        shown = found[: wanted.limit]
        return EventPage(shown, shown[-1].id if len(found) > wanted.limit else None)
