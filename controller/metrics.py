"""What Prometheus is told of this controller besides its calls: how its parts are at the moment of the scrape.

Calls count themselves: `core.rpc_metrics` (gRPC, refused tokens among them), `api.metrics_http` (HTTP, operators'
refusals among them), `gateway.gateway_metrics` (requests and the heavy tier). Never an agent, client or operator by
name: sites, models, roles and words of our own are the only labels.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from controller.fleet.model import AgentView
from controller.fleet.service import Fleet
from controller.heavy.client import HeavyClient
from controller.records.service import Records
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


@dataclass(frozen=True, slots=True)
class Watched:
    """The parts that are asked at a scrape; databases by name."""

    fleet: Fleet
    transfers: Transfers
    traces: Traces
    forwarder: Forwarder | None
    heavy: HeavyClient
    catalogue: Catalogue
    databases: Mapping[str, Database]


def register_controller(registry: Registry, watched: Watched, *, clock: Clock) -> None:
    _register_fleet(registry, watched.fleet, clock)
    _register_flows(registry, watched)
    _register_parts(registry, watched)


def _register_fleet(registry: Registry, fleet: Fleet, clock: Clock) -> None:
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
        lambda: _pairs(asdict(fleet.pushes)),
    )


def _register_flows(registry: Registry, watched: Watched) -> None:
    registry.tally(
        "nanofleet_sent_bytes",
        "Bytes of encoded chunks sent to agents.",
        ("codec",),
        lambda: _pairs({codec.value: count for codec, count in watched.transfers.sent_bytes.items()}),
    )
    registry.tally(
        "nanofleet_spans",
        "Spans by what became of them here; dropped are those that should have gone on to a collector.",
        ("outcome",),
        lambda: _pairs(_spans(watched)),
    )
    registry.gauge(
        "nanofleet_span_spool_bytes",
        "Bytes of spans on disk that wait for the collector.",
        (),
        lambda: [((), float(_forwarded(watched).spooled_bytes))],
    )


def _forwarded(watched: Watched) -> ForwardCounters:
    return ForwardCounters() if watched.forwarder is None else watched.forwarder.counters


def _spans(watched: Watched) -> Mapping[str, int]:
    counters = _forwarded(watched)
    return {
        "taken": watched.traces.taken_count,
        "refused": watched.traces.refused_count,
        "forwarded": counters.forwarded,
        "dropped": counters.shed + counters.refused,
    }


def _register_parts(registry: Registry, watched: Watched) -> None:
    heavy, catalogue = watched.heavy, watched.catalogue
    registry.gauge(
        "nanofleet_heavy_breaker_state",
        "1 for the state of the breaker in front of the heavy tier.",
        ("state",),
        lambda: [((state.value,), float(state is heavy.breaker_state)) for state in BreakerState],
    )
    registry.gauge("nanofleet_heavy_ready", "1 when the heavy tier answers.", (), lambda: [((), float(heavy.is_ready))])
    registry.gauge(
        "nanofleet_database_waiting",
        "Use cases that wait for a database.",
        ("database",),
        lambda: _pairs({name: database.waiting for name, database in watched.databases.items()}),
    )
    registry.gauge(
        "nanofleet_catalogue_expiry_timestamp_seconds",
        "When a role of the catalogue must be signed again, in Unix time.",
        ("role",),
        lambda: [((role,), at.timestamp()) for role, at in catalogue.expiries().items()],
    )


def register_records(registry: Registry, records: Records) -> None:
    """Add how many records of agents came in, by what became of them."""
    registry.tally(
        "nanofleet_agent_records",
        "Records of agents, by what became of them; `turned_away`: batches, which come again.",
        ("outcome",),
        lambda: _pairs({"taken": records.taken, "refused": records.refused, "turned_away": records.turned_away}),
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


def _pairs(counts: Mapping[str, int]) -> Iterable[Reading]:
    return [((word,), count) for word, count in sorted(counts.items())]
