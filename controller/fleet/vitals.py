"""What agents last said of their use and their machines: in memory only, for whoever looks now.

An agent says it again with its next session, so nothing is lost that matters by forgetting all of it.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import datetime, timedelta

from core.clock import Clock
from core.fleet_state import AgentVitals, Energy, MachineHealth, Usage
from core.ids import AgentId

# Over which rates are taken.
WINDOW_S = 60.0
# How often an agent speaks that has something to say.
_PACE_S = 15.0
# Derived: agents speak every 15 s at most; one before the window begins, and some more after a reconnect.
_MAX_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class SeenVitals:
    """`usage` is counted from `since`; rates are of the last minute, `escalated_ratio` None without answers in it."""

    usage: Usage
    since: datetime
    requests_per_s: float
    escalated_ratio: float | None
    health: MachineHealth
    reported_at: datetime
    energy: Energy | None = None


@dataclass(slots=True)
class _Known:
    boot_id: str
    since: datetime
    health: MachineHealth
    reported_at: datetime
    samples: "deque[tuple[float, Usage]]"
    energy: Energy | None = None


class VitalsBoard:
    """Of at most `max_agents` agents, those that spoke last."""

    def __init__(self, *, max_agents: int, clock: Clock) -> None:
        self._max_agents = max_agents
        self._clock = clock
        self._known: OrderedDict[AgentId, _Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def note(self, agent_id: AgentId, boot_id: str, vitals: AgentVitals) -> None:
        now = self._clock.now()
        known = self._known.get(agent_id)
        if known is None or known.boot_id != boot_id:
            since = _before(now, vitals.uptime_s)
            known = _Known(boot_id, since, vitals.health, now, deque(maxlen=_MAX_SAMPLES))
            self._known[agent_id] = known
        known.health, known.energy, known.reported_at = vitals.health, vitals.energy, now
        known.samples.append((self._clock.monotonic_s(), vitals.usage))
        self._known.move_to_end(agent_id)
        if len(self._known) > self._max_agents:
            self._known.popitem(last=False)

    def of(self, agent_id: AgentId) -> SeenVitals | None:
        """Return what is known of an agent; None: it never said anything."""
        known = self._known.get(agent_id)
        if known is None:
            return None
        latest = known.samples[-1][1]
        recent, over_s = self._recent(known)
        answered = recent.answered_edge + recent.answered_heavy
        return SeenVitals(
            usage=latest,
            since=known.since,
            requests_per_s=(answered + recent.refused + recent.failed) / over_s,
            escalated_ratio=recent.answered_heavy / answered if answered else None,
            health=known.health,
            reported_at=known.reported_at,
            energy=known.energy,
        )

    def forget(self, agent_id: AgentId) -> None:
        self._known.pop(agent_id, None)

    def _recent(self, known: _Known) -> tuple[Usage, float]:
        """Return what was counted within the window, and over how many seconds.

        Since an agent that has nothing to say says nothing, what it said before the window is how the window began.
        """
        now_s = self._clock.monotonic_s()
        before = [sample for sample in known.samples if sample[0] <= now_s - WINDOW_S]
        first_s, first = before[-1] if before else known.samples[0]
        latest_s, latest = known.samples[-1]
        grown = Usage(
            max(0, latest.answered_edge - first.answered_edge),
            max(0, latest.answered_heavy - first.answered_heavy),
            max(0, latest.refused - first.refused),
            max(0, latest.failed - first.failed),
        )
        # What happened since its last word, it will say with the next.
        passed_s = now_s - first_s - min(now_s - latest_s, _PACE_S)
        # What was said long before the window began was true until it did.
        return grown, WINDOW_S if passed_s > WINDOW_S + _PACE_S else max(1.0, passed_s)


def _before(now: datetime, seconds: float) -> datetime:
    try:
        return now - timedelta(seconds=seconds)
    except OverflowError:
        return datetime.min.replace(tzinfo=now.tzinfo)
