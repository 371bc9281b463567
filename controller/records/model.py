"""The values of the records: hours of usage, events, and how long ago an agent with a wrong clock may mean."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum

from core.fleet_state import Usage
from core.ids import AgentId

HOUR = timedelta(hours=1)
# Chosen: clocks that are set by hand are off by minutes; an hour that has just begun ends in the future.
_AHEAD = timedelta(hours=2)
# Chosen: beyond what an outbox keeps; an older instant is that of a clock that was never set.
_BEHIND = timedelta(days=120)


@dataclass(frozen=True, slots=True)
class Told:
    """When an agent wrote something down: by its wall clock, and by the one that never jumps."""

    at: datetime
    age: timedelta

    def believed(self, now: datetime) -> datetime:
        """Return when that was: what the wall clock said, unless that cannot be."""
        return self.at if now - _BEHIND <= self.at <= now + _AHEAD else now - self.age


@dataclass(frozen=True, slots=True)
class HourUsage:
    """What became of requests to one model in one hour of one process; `told` is when that was last written."""

    boot_id: str
    # As the agent calls it, part of the key.
    hour: datetime
    model: str
    usage: Usage
    told: Told

    def believed_hour(self, now: datetime) -> datetime:
        told = Told(self.hour, self.told.age).believed(now)
        return told.replace(minute=0, second=0, microsecond=0)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an agent."""

    dedupe_id: str
    action: str
    target: str
    detail: str
    count: int
    told: Told


@dataclass(frozen=True, slots=True)
class KnownEvent:
    """An event as it is kept: `at` is what we believe, `received_at` is by our own clock."""

    id: int
    agent_id: AgentId
    at: datetime
    received_at: datetime
    action: str
    target: str
    detail: str
    count: int


class Per(StrEnum):
    """What the numbers of a day are told apart by."""

    MODEL = "model"
    AGENT = "agent"
    BOTH = "both"
    FLEET = "fleet"


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """`until` is the last day that counts."""

    since: date
    until: date
    per: Per
    agent: AgentId | None = None
    model: str | None = None
    limit: int = 1000


@dataclass(frozen=True, slots=True)
class DayUsage:
    """`agent_id`, `model`: None where the numbers are of all of them."""

    day: date
    agent_id: AgentId | None
    model: str | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class EventFilter:
    """`before`: only what came before that id; `action` with a dot at its end stands for all that begin so."""

    agent_id: AgentId
    limit: int
    before: int | None = None
    action: str | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """How much is kept: of each agent, and for how long."""

    max_events: int
    max_hours: int
    kept_for: timedelta


def begin_of(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
