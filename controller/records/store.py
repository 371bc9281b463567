"""The port from the records to a database; `controller.storage.records` implements it.

Each method is one transaction.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from controller.records.model import DayUsage, Event, EventFilter, HourUsage, Kept, KnownEvent, UsageFilter
from core.ids import AgentId


class RecordStore(Protocol):
    async def add(
        self, agent_id: AgentId, hours: Sequence[HourUsage], events: Sequence[Event], *, now: datetime, kept: Kept
    ) -> None:
        """Take in what one agent tells, in this order.

        An event with an id that is known of that agent is left as it is; of an hour that is known the greater numbers
        count. The agent's oldest go when there are more than `kept` says.
        """
        ...

    async def forget(self, *, before: datetime) -> int:
        """Remove what is older; return how many rows that were."""
        ...

    async def usage(self, wanted: UsageFilter) -> Sequence[DayUsage]:
        """Return the sums of days, the newest first."""
        ...

    async def events(self, wanted: EventFilter) -> Sequence[KnownEvent]:
        """Return events, the newest first."""
        ...
