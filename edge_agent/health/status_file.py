"""How this agent is, as a file: written by the running agent, read by `nanofleet-agent status` and by people.

The writer looks once a second and writes when something changed; counters and what is in memory, which change with
every request, are written every few seconds only, so that a busy agent does not wear out its flash.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from core.atomic_files import write_atomically
from core.clock import Clock
from core.errors import InvalidRequest, NotFound
from core.fleet_state import Energy, ReportedState, SlotReport
from edge_agent.identity.renewal import RenewalStatus

if TYPE_CHECKING:
    # Brings ONNX Runtime, which whoever reads a status does without.
    from edge_agent.runtime.pool import ModelPool

LOOK_INTERVAL_S = 1.0
# Chosen: counters are for people and for trends; liveness shows in the lock of the state folder.
COUNTERS_INTERVAL_S = 10.0


class _View(BaseModel):
    # Not `forbid`: a status command may be older than the agent that it asks.
    model_config = ConfigDict(frozen=True, extra="ignore")


class PeerView(_View):
    """The controller or the broker, as this agent sees it."""

    address: str
    state: str
    is_connected: bool
    since: datetime
    """When it was last connected or ceased to be."""
    last_error: str = ""
    retry_at: datetime | None = None


class ModelView(_View):
    model: str
    version: int
    variant: str
    digest: str
    phase: str
    stored_bytes: int
    total_bytes: int
    problem: str = ""

    @classmethod
    def of(cls, report: SlotReport) -> Self:
        slot = report.slot
        return cls(
            model=slot.model,
            version=slot.version,
            variant=slot.variant,
            digest=slot.manifest_digest,
            phase=report.phase.value,
            stored_bytes=report.stored_bytes,
            total_bytes=report.total_bytes,
            problem="" if report.problem is None else f"{report.problem.code}: {report.problem.message}",
        )


class ResidencyView(_View):
    state: str
    """`resident`, `cold`, `loading` or `unloading`."""
    taken_bytes: int
    """Memory that it takes now, as it was measured."""
    reason: str = ""
    """Why it is not in memory."""


class MemoryView(_View):
    """Which models are in memory, and what that takes of what they may take together."""

    budget_bytes: int
    taken_bytes: int
    models: dict[str, ResidencyView]

    @classmethod
    def of(cls, pool: "ModelPool") -> Self:
        found = {model.manifest.model: pool.residency(model.manifest.model) for model in pool.models()}
        return cls(
            budget_bytes=pool.budget_bytes,
            taken_bytes=pool.taken_bytes,
            models={
                name: ResidencyView(state=one.phase.value, taken_bytes=one.taken_bytes, reason=one.reason)
                for name, one in found.items()
            },
        )


class CertificateView(_View):
    """The agent's own certificate."""

    not_after: datetime
    last_error: str = ""
    """Why the last renewal failed."""
    retry_at: datetime | None = None
    clock_problem: str = ""
    """How this machine's clock contradicts the certificate."""

    @classmethod
    def of(cls, status: RenewalStatus) -> Self:
        return cls(
            not_after=status.not_after,
            last_error=status.last_error,
            retry_at=status.retry_at,
            clock_problem=status.clock_problem,
        )


class EnergyView(_View):
    """What the agent's work took by one method, since it began; `recent` is about a minute."""

    method: str
    joules: float
    answers: int
    watts: float
    recent_joules: float
    recent_answers: int

    @classmethod
    def of(cls, energy: Energy) -> Self:
        return cls(
            method=energy.method.value,
            joules=round(energy.joules, 3),
            answers=energy.answers,
            watts=round(energy.watts, 3),
            recent_joules=round(energy.recent_joules, 3),
            recent_answers=energy.recent_answers,
        )


class WaitingView(_View):
    """What waits in the outbox of one kind, and what became of the rest since the process began."""

    rows: int
    size_bytes: int
    oldest_age_s: float | None
    sent: int
    lost: dict[str, int]
    """By reason."""

    @property
    def text(self) -> str:
        lost = "".join(f", {rows} lost ({why})" for why, rows in sorted(self.lost.items()))
        return f"{self.rows} wait, {self.sent} sent{lost}"


class OutboxView(_View):
    """What waits for the controller or the heavy tier."""

    trouble: str = ""
    """Why rows are kept in memory only, and few: `full`, `read_only` or `faulty`; empty: they are on disk."""
    is_heavy_reachable: bool = True
    """As probes know."""
    clock_jumps: int = 0
    kinds: dict[str, WaitingView] = {}

    @property
    def news(self) -> tuple[str, bool]:
        """What is worth writing at once, in contrast to numbers."""
        return self.trouble, self.is_heavy_reachable


class AgentIdentity(_View):
    agent_id: str
    site: str
    software_version: str
    boot_id: str
    pid: int
    started_at: datetime


class AgentStatus(_View):
    agent: AgentIdentity
    controller: PeerView
    broker: PeerView | None
    """None: switched off in the settings."""
    certificate: CertificateView
    epoch: int
    generation: int
    models: tuple[ModelView, ...]
    heavy_breaker: str
    """`open`: the heavy tier failed repeatedly, so the edge answers alone for the moment."""
    clock_problem: str = ""
    """How this machine's clock contradicts what the catalogue says has passed."""
    memory: MemoryView | None = None
    """None: written by an agent that kept every model in memory."""
    outbox: OutboxView = OutboxView()
    """What waits for the controller or the heavy tier."""
    counters: dict[str, int]
    energy: EnergyView | None = None
    """None: switched off, or nothing is known yet."""
    written_at: datetime

    @classmethod
    def of(
        cls,
        agent: AgentIdentity,
        reported: ReportedState,
        *,
        controller: PeerView,
        broker: PeerView | None,
        certificate: CertificateView,
        heavy_breaker: str,
        clock_problem: str = "",
        memory: MemoryView | None = None,
        outbox: OutboxView = OutboxView(),  # noqa: B008 (frozen)
        counters: dict[str, int],
        energy: Energy | None = None,
        now: datetime,
    ) -> Self:
        return cls(
            agent=agent,
            controller=controller,
            broker=broker,
            certificate=certificate,
            heavy_breaker=heavy_breaker,
            clock_problem=clock_problem,
            epoch=reported.applied.epoch,
            generation=reported.applied.generation,
            models=tuple(ModelView.of(report) for report in reported.slots),
            memory=memory,
            outbox=outbox,
            counters=counters,
            energy=None if energy is None else EnergyView.of(energy),
            written_at=now,
        )

    def differs_from(self, other: "AgentStatus | None", *, age_s: float) -> bool:
        """Say whether this status is worth writing over `other`, which was written `age_s` ago."""
        if other is None:
            return True
        if self._numbers != other._numbers and age_s >= COUNTERS_INTERVAL_S:
            return True
        if self.outbox.news != other.outbox.news:
            return True
        # Joules change all the time, and an agent at rest writes nothing.
        aside = {name: getattr(other, name) for name in ("counters", "memory", "outbox", "energy", "written_at")}
        return self.model_copy(update=aside) != other

    @property
    def _numbers(self) -> tuple[object, ...]:
        """What changes with every request; ages and joules, which change by themselves, are no news."""
        waiting = {kind: (each.rows, each.sent, each.lost) for kind, each in self.outbox.kinds.items()}
        took = None if self.energy is None else (self.energy.method, self.energy.answers)
        return self.counters, self.memory, waiting, self.outbox.clock_jumps, took


def read_status(path: Path) -> AgentStatus:
    """Return the status in `path`.

    Raises:
        NotFound: no agent has written one there.
        InvalidRequest: it is not a status.
    """
    try:
        return AgentStatus.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path}: no agent has written its status here; give the agent's --state-dir") from None
    except ValidationError as error:
        raise InvalidRequest(f"{path}: expected an agent's status, got {error.error_count()} errors") from error


class Since:
    """Remembers since when a claim is as it is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._claim: bool | None = None
        self._since = clock.now()

    def of(self, claim: bool) -> datetime:
        if claim is not self._claim:
            self._claim, self._since = claim, self._clock.now()
        return self._since


class StatusWriter:
    """Keeps the file up to date; `look` gives the status of this moment."""

    def __init__(
        self,
        path: Path,
        look: Callable[[], AgentStatus],
        *,
        disk: Executor,
        clock: Clock,
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`refresh` is awaited before each look, for what cannot be read at once."""
        self._refresh = refresh
        self._path = path
        self._look = look
        self._disk = disk
        self._clock = clock
        self._written: AgentStatus | None = None
        self._written_at_s = 0.0

    async def run(self) -> None:
        while True:
            if self._refresh is not None:
                await self._refresh()
            await self.write_if_changed()
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def write_if_changed(self) -> None:
        now_s = self._clock.monotonic_s()
        status = self._look()
        if status.differs_from(self._written, age_s=now_s - self._written_at_s):
            content = status.model_dump_json(indent=1).encode()
            await asyncio.get_running_loop().run_in_executor(self._disk, write_atomically, self._path, content)
            self._written, self._written_at_s = status, now_s
