"""What Prometheus is told of this controller besides its calls: how its parts are at the moment of the scrape.

Calls count themselves: `core.rpc_metrics` (gRPC, refused tokens among them), `api.metrics_http` (HTTP, operators'
refusals among them), `gateway.gateway_metrics` (requests and the heavy tier). Never an agent, client or operator by
name: sites, models, roles and words of our own are the only labels.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from controller.fleet.model import AgentView
from controller.fleet.service import Fleet
from controller.heavy.client import HeavyClient
from controller.signing.service import Catalogue
from controller.storage.database import Database
from controller.traces.forward import ForwardCounters, Forwarder
from controller.traces.service import Traces
from controller.transfer.service import Transfers
from core.breaker import BreakerState
from core.clock import Clock
from core.fleet_state import SlotPhase
from core.metrics import Reading, Registry

# Chosen: reading the whole fleet takes this process at most a twentieth of its time, and is at least this old.
CENSUS_SHARE = 20
CENSUS_AGE_S = 5.0


def register_fleet(registry: Registry, fleet: Fleet, *, clock: Clock) -> None:
    """Add what says how the agents are."""
    census = _Census(fleet, clock)
    registry.before_scrape(census.refresh)
    registry.gauge("nanofleet_sessions", "Agents connected, by site.", ("site",), lambda: _pairs(fleet.sites()))
    registry.gauge(
        "nanofleet_devices", "Agents that ever said hello, by state.", ("state",), lambda: _pairs(census.states)
    )
    registry.gauge(
        "nanofleet_fleet_slots",
        "Models on agents, by what these last reported.",
        ("phase",),
        lambda: _pairs(census.phases),
    )
    registry.tally(
        "nanofleet_pushes",
        "Assignments sent to agents, and how these took them.",
        ("outcome",),
        lambda: [
            (("sent",), fleet.pushes.sent),
            (("applied",), fleet.pushes.applied),
            (("rejected",), fleet.pushes.rejected),
        ],
    )


def register_transfers(registry: Registry, transfers: Transfers) -> None:
    registry.tally(
        "nanofleet_sent_bytes",
        "Bytes of encoded chunks sent to agents.",
        ("codec",),
        lambda: _pairs({codec.value: count for codec, count in transfers.sent_bytes.items()}),
    )


def register_spans(registry: Registry, traces: Traces, forwarder: Forwarder | None) -> None:
    """Add what became of spans; `forwarded` and `dropped` are about those that should go on to a collector."""
    counters = _counters_of(forwarder)
    registry.tally(
        "nanofleet_spans",
        "Spans by what became of them here.",
        ("outcome",),
        lambda: [
            (("taken",), traces.taken_count),
            (("refused",), traces.refused_count),
            (("forwarded",), counters().forwarded),
            (("dropped",), counters().shed + counters().refused),
        ],
    )
    registry.gauge(
        "nanofleet_span_spool_bytes",
        "Bytes of spans on disk that wait for the collector.",
        (),
        lambda: [((), float(counters().spooled_bytes))],
    )


def _counters_of(forwarder: Forwarder | None) -> Callable[[], ForwardCounters]:
    """Return what reads the counters of a forwarder; without one, nothing was ever forwarded."""
    return ForwardCounters if forwarder is None else lambda: forwarder.counters


def register_heavy(registry: Registry, heavy: HeavyClient) -> None:
    registry.gauge(
        "nanofleet_heavy_breaker_state",
        "1 for the state of the breaker in front of the heavy tier.",
        ("state",),
        lambda: [((state.value,), float(state is heavy.breaker_state)) for state in BreakerState],
    )
    registry.gauge("nanofleet_heavy_ready", "1 when the heavy tier answers.", (), lambda: [((), float(heavy.is_ready))])


def register_stores(registry: Registry, databases: Sequence[tuple[str, Database]], catalogue: Catalogue) -> None:
    registry.gauge(
        "nanofleet_database_waiting",
        "Use cases that wait for a database.",
        ("database",),
        lambda: [((name,), database.waiting) for name, database in databases],
    )
    registry.gauge(
        "nanofleet_catalogue_expiry_timestamp_seconds",
        "When a role of the catalogue must be signed again, in Unix time.",
        ("role",),
        lambda: [((role,), at.timestamp()) for role, at in catalogue.expiries().items()],
    )


class _Census:
    """The whole fleet in a few numbers; counting 10,000 agents takes a while, so it is not done at every scrape."""

    def __init__(self, fleet: Fleet, clock: Clock) -> None:
        self._fleet = fleet
        self._clock = clock
        self._due_at_s = -math.inf
        self._counting = asyncio.Lock()
        self.states: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()

    async def refresh(self) -> None:
        async with self._counting:
            began_s = self._clock.monotonic_s()
            if began_s < self._due_at_s:
                return
            agents = await self._fleet.agents()
            self.states, self.phases = _states(agents), _phases(agents)
            ended_s = self._clock.monotonic_s()
            self._due_at_s = ended_s + max(CENSUS_AGE_S, CENSUS_SHARE * (ended_s - began_s))


def _states(agents: Sequence[AgentView]) -> Counter[str]:
    counts = Counter({"online": 0, "offline": 0, "out_of_sync": 0, "rejecting": 0, "ahead": 0})
    for view in agents:
        counts["online" if view.is_online else "offline"] += 1
        counts["out_of_sync"] += not view.agent.is_in_sync
        counts["rejecting"] += view.agent.rejection is not None
        counts["ahead"] += view.agent.is_ahead
    return counts


def _phases(agents: Sequence[AgentView]) -> Counter[str]:
    counts = Counter({phase.value: 0 for phase in SlotPhase})
    counts.update(report.phase.value for view in agents for report in view.agent.reported.slots)
    return counts


def _pairs(counts: "dict[str, int] | Counter[str]") -> Iterable[Reading]:
    return [((word,), count) for word, count in sorted(counts.items())]
