"""What Prometheus is told of this agent besides its requests: how its parts are at the moment of the scrape.

Nothing is kept here. States are one gauge per word, 1 for the one that holds, so that a rule can name it. Beside this:
`request_metrics` (requests and their stages), `front.mqtt.message_metrics`, `core.process_metrics`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict
from enum import Enum

from core.breaker import BreakerState
from core.fleet_state import Energy, SlotPhase
from core.metrics import Reading, Registry
from edge_agent.cached_answers import CachedAnswers
from edge_agent.cascade.offload import Offload
from edge_agent.energy.meter import EnergyMeter
from edge_agent.front.mqtt.broker import BrokerState
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.link.session import SessionState
from edge_agent.member import Member
from edge_agent.outbox.rows import Tally
from edge_agent.outbox.storage import Trouble
from edge_agent.post import PostOffice
from edge_agent.runtime.pool import ModelPool
from edge_agent.runtime.response_cache import ResponseCache

# Chosen: a scrape has 10 s by default; a large file is hashed for as long as that.
DISK_PATIENCE_S = 1.0
# What the connection's loss may make smaller (what was not acknowledged goes out again), so no counter to Prometheus.
_NOT_MONOTONIC = "replied"


def register_serving(registry: Registry, *, pool: ModelPool, offload: Offload) -> None:
    """Add what says how requests are served."""
    registry.gauge(
        "nanofleet_queue_depth",
        "Requests that wait for a run of their model.",
        ("model",),
        lambda: [((model.manifest.model,), model.batcher.queued) for model in pool.models()],
    )
    registry.tally(
        "nanofleet_queue_shed",
        "Requests that were not run, by why.",
        ("model", "reason"),
        lambda: [
            ((model.manifest.model, reason.value), count)
            for model in pool.models()
            for reason, count in model.shed.items()
        ],
    )
    registry.gauge("nanofleet_models_running", "Models that answer.", (), lambda: [((), len(pool.models()))])
    register_residency(registry, pool)
    registry.gauge(
        "nanofleet_escalations_in_flight",
        "Requests that the heavy tier is asked now.",
        (),
        lambda: [((), offload.in_flight)],
    )
    registry.gauge(
        "nanofleet_heavy_expected_seconds",
        "How long the heavy tier takes in nine of ten cases, by the large model; with less time left it is not asked.",
        ("model",),
        lambda: [((model,), seconds) for model, seconds in offload.expected_s().items()],
    )
    registry.gauge(
        "nanofleet_heavy_breaker_state",
        "1 for the state of the breaker in front of the heavy tier.",
        ("state",),
        lambda: one_of(BreakerState, offload.state),
    )


def register_residency(registry: Registry, pool: ModelPool) -> None:
    """Add what says which models are in memory, and what that costs."""
    counts = pool.load_counts
    registry.gauge(
        "nanofleet_model_memory_bytes",
        "Memory that a model takes now, as it was measured; 0: it is not in memory.",
        ("model",),
        lambda: [((name,), pool.residency(name).taken_bytes) for name in pool.running()],
    )
    registry.gauge(
        "nanofleet_model_memory_budget_bytes",
        "Memory that models may take together.",
        (),
        lambda: [((), pool.budget_bytes)],
    )
    registry.tally(
        "nanofleet_model_loads",
        "Models brought into memory, or tried to, by what became of it.",
        ("outcome",),
        lambda: [(("loaded",), counts.loads), (("failed",), counts.failed_loads)],
    )
    registry.tally("nanofleet_model_load_seconds", "Time spent on loading models.", (), lambda: [((), counts.load_s)])
    registry.tally(
        "nanofleet_model_evictions", "Models that left memory for others.", (), lambda: [((), counts.evictions)]
    )
    registry.tally(
        "nanofleet_cold_requests",
        "Requests that came while their model was not in memory: held until it was, or refused at once.",
        ("outcome",),
        lambda: [
            (("held",), counts.cold_requests - counts.refused_requests),
            (("refused",), counts.refused_requests),
        ],
    )


def register_cache(registry: Registry, cached: CachedAnswers | None) -> None:
    """Add what says how often an answer is given again, by model; nothing for those that keep none."""
    caches: Mapping[str, ResponseCache] = {} if cached is None else cached.caches()
    registry.tally(
        "nanofleet_cache_lookups",
        "Requests that the response cache of their model was asked for.",
        ("model", "outcome"),
        lambda: [
            reading
            for name, cache in caches.items()
            for reading in (((name, "hit"), cache.hits), ((name, "miss"), cache.misses))
        ],
    )
    registry.gauge(
        "nanofleet_cache_bytes",
        "Memory that kept answers and their requests take.",
        ("model",),
        lambda: [((name,), cache.size_bytes) for name, cache in caches.items()],
    )


def register_energy(registry: Registry, meter: EnergyMeter) -> None:
    """Add what the agent's work takes; figures of different methods stand apart."""
    registry.tally(
        "nanofleet_energy_joules",
        "The agent's part of the machine's energy, by its share of the processor time.",
        ("method",),
        lambda: [((energy.method.value,), energy.joules) for energy in meter.totals()],
    )
    registry.tally(
        "nanofleet_energy_answers",
        "Answers that were given while energy was known by the method.",
        ("method",),
        lambda: [((energy.method.value,), energy.answers) for energy in meter.totals()],
    )
    registry.gauge(
        "nanofleet_energy_joules_per_answer",
        "Of the last minute, by the method in use; nothing without answers.",
        ("method",),
        lambda: _recent_j(meter.energy),
    )


def register_broker(registry: Registry, front: Callable[[], MqttFront | None]) -> None:
    """Add what says how devices reach this agent; `front` None: not yet, or switched off."""

    def state() -> BrokerState:
        found = front()
        return BrokerState.STOPPED if found is None else found.state

    registry.gauge(
        "nanofleet_broker_state",
        "1 for the state of the connection to the broker.",
        ("state",),
        lambda: one_of(BrokerState, state()),
    )
    registry.gauge("nanofleet_requests_in_flight", "Requests from devices under way.", (), lambda: _in_flight(front()))
    registry.tally(
        "nanofleet_mqtt_messages",
        "Messages from devices, by what became of them.",
        ("outcome",),
        lambda: _messages(front()),
    )


def register_member(registry: Registry, member: Member, *, disk: Executor) -> None:
    """Add what says how this agent stands in its fleet."""
    registry.gauge(
        "nanofleet_controller_link_state",
        "1 for the state of the session with the controller.",
        ("state",),
        lambda: one_of(SessionState, SessionState(member.controller_view().state)),
    )
    registry.gauge("nanofleet_slots", "Models that this agent shall run, by phase.", ("phase",), lambda: _slots(member))
    registry.gauge(
        "nanofleet_certificate_expiry_timestamp_seconds",
        "When the agent's certificate ends, in Unix time.",
        (),
        lambda: [((), member.renewal.status().not_after.timestamp())],
    )
    registry.gauge(
        "nanofleet_clock_alarm",
        "1 when this machine's clock contradicts the catalogue or the certificate.",
        (),
        lambda: [((), float(bool(member.clock_problem or member.renewal.status().clock_problem)))],
    )
    registry.tally(
        "nanofleet_fetched_bytes",
        "Bytes of encoded chunks that came from the controller.",
        ("codec",),
        lambda: [((codec.value,), count) for codec, count in member.fetched_bytes().items()],
    )
    sizes = _StoreSizes(member, disk)
    registry.before_scrape(sizes.refresh)
    registry.gauge("nanofleet_store_bytes", "Bytes of models in store.", (), lambda: [((), sizes.stored_bytes)])
    registry.gauge(
        "nanofleet_store_free_bytes", "Bytes that the disk of the store has free.", (), lambda: [((), sizes.free_bytes)]
    )


def register_post(registry: Registry, post: PostOffice) -> None:
    """Add what waits in the outbox, what left it and what was lost."""

    def tallies(read: Callable[[Tally, float], float]) -> Iterable[Reading]:
        figures = post.figures
        if figures is None:
            return []
        return [((kind.value,), read(tally, figures.now_s)) for kind, tally in figures.tallies.items()]

    registry.gauge(
        "nanofleet_outbox_rows", "Rows that wait.", ("kind",), lambda: tallies(lambda tally, _: float(tally.rows))
    )
    registry.gauge(
        "nanofleet_outbox_bytes",
        "Bytes of the rows that wait.",
        ("kind",),
        lambda: tallies(lambda tally, _: float(tally.size_bytes)),
    )
    registry.gauge(
        "nanofleet_outbox_oldest_age_seconds",
        "How long the oldest row has waited; 0 when none does.",
        ("kind",),
        lambda: tallies(lambda tally, now_s: 0.0 if tally.oldest_s is None else max(0.0, now_s - tally.oldest_s)),
    )
    registry.tally(
        "nanofleet_outbox_sent",
        "Rows that their receiver took.",
        ("kind",),
        lambda: [((kind.value,), count) for kind, count in post.sent.items()],
    )
    registry.tally(
        "nanofleet_outbox_lost",
        "Rows that were lost, by reason.",
        ("kind", "reason"),
        lambda: (
            []
            if post.figures is None
            else [((kind.value, why.value), rows) for (kind, why), rows in post.figures.losses.items()]
        ),
    )
    registry.gauge(
        "nanofleet_outbox_disk_state",
        "1 for how the disk of the outbox is; all but `ok`: rows are kept in memory only, and few.",
        ("state",),
        lambda: _disk_state(post),
    )
    registry.gauge(
        "nanofleet_heavy_reachable",
        "1 while the heavy tier can be reached, as probes know.",
        (),
        lambda: [((), float(post.reachability.is_reachable()))],
    )
    registry.tally("nanofleet_probes", "Probes of the heavy tier.", (), lambda: [((), float(post.reachability.probes))])
    registry.tally("nanofleet_clock_jumps", "Jumps of the wall clock.", (), lambda: [((), float(post.clock_jumps))])


def _disk_state(post: PostOffice) -> Iterable[Reading]:
    trouble = None if post.figures is None else post.figures.trouble
    holds = "ok" if trouble is None else trouble.value
    states = ("ok", *(each.value for each in Trouble if each is not Trouble.CORRUPT))
    return [((state,), float(state == holds)) for state in states]


class _StoreSizes:
    """What the disk says, asked on its own thread: it may wait for a fetch."""

    def __init__(self, member: Member, disk: Executor) -> None:
        self._member = member
        self._disk = disk
        self._look: asyncio.Future[tuple[int, int]] | None = None
        self.stored_bytes = self.free_bytes = 0

    async def refresh(self) -> None:
        """Bring the numbers up to date, unless the disk is busy for longer than a scrape should wait."""
        if self._look is None:
            self._look = asyncio.get_running_loop().run_in_executor(self._disk, self._member.store_sizes)
        await asyncio.wait([self._look], timeout=DISK_PATIENCE_S)
        if self._look.done():
            look, self._look = self._look, None
            self.stored_bytes, self.free_bytes = look.result()


def one_of(states: type[Enum], holds: Enum) -> Iterable[Reading]:
    return [((str(state.value),), float(state is holds)) for state in states]


def _recent_j(energy: Energy | None) -> Iterable[Reading]:
    if energy is None or energy.recent_j_per_answer is None:
        return []
    return [((energy.method.value,), energy.recent_j_per_answer)]


def _in_flight(front: MqttFront | None) -> Iterable[Reading]:
    return [((), 0 if front is None else front.in_flight)]


def _messages(front: MqttFront | None) -> Iterable[Reading]:
    if front is None:
        return []
    return [((name,), count) for name, count in asdict(front.counters).items() if name != _NOT_MONOTONIC]


def _slots(member: Member) -> Iterable[Reading]:
    phases = Counter(report.phase for report in member.board.reported().slots)
    return [((phase.value,), phases[phase]) for phase in SlotPhase]
