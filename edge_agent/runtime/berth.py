"""The place in memory of one variant: what it would take, what it takes now, and why it is not there."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from core.backoff import Backoff, BackoffPolicy
from core.open_inference.messages import ModelIndexEntry
from edge_agent.runtime.footprint import Footprint
from edge_agent.runtime.model import LoadedModel
from edge_agent.runtime.opening import Opened, Session

# Chosen: a damaged file stays damaged until it is fetched again; a disk that hung is back in a second.
RETRY = BackoffPolicy(2.0, 60.0)
_MAX_REASON_CHARS = 256
# How far loads may raise a figure. Chosen: beyond it, others have taken memory meanwhile.
_GROWN_SHARE, _GROWN_BYTES = 1.1, 1 << 20


class Phase(StrEnum):
    COLD = "cold"
    LOADING = "loading"
    RESIDENT = "resident"
    LEAVING = "unloading"


@dataclass(slots=True)
class LoadCounts:
    """What happened since the process began; for status and metrics."""

    loads: int = 0
    failed_loads: int = 0
    load_s: float = 0.0
    evictions: int = 0
    # Requests that came while their model was not in memory, and those of them that were refused at once.
    cold_requests: int = 0
    refused_requests: int = 0

    def totals(self) -> dict[str, int]:
        """Return the counts by the names that they have beside those of other parts."""
        return {
            "model_loads": self.loads,
            "model_loads_failed": self.failed_loads,
            "model_evictions": self.evictions,
            "requests_to_cold_models": self.cold_requests,
            "requests_to_cold_models_refused": self.refused_requests,
        }


@dataclass(slots=True, eq=False)
class Berth:
    """The place of one variant: what it would take, and what it takes now."""

    model: LoadedModel
    # None: it cannot be loaded again, so it never leaves.
    open: Callable[[], Opened] | None
    footprint: Footprint
    is_pinned: bool = False
    is_prewarmed: bool = False
    # By hand: loaded to stay, or unloaded to stay so.
    is_kept: bool = False
    is_parked: bool = False
    is_gone: bool = False
    replaced_by: "Berth | None" = None
    key: str = ""
    phase: Phase = Phase.COLD
    taken_bytes: int = 0
    loaded_at_s: float = 0.0
    uses_seen: int = 0
    session: Session | None = None
    problem: str = ""
    retry_at_s: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(RETRY))

    # Of the footprint, what was measured before any load here.
    measured_bytes: int = 0

    def __post_init__(self) -> None:
        self.measured_bytes = self.footprint.resident_bytes

    def correct(self, opened: Opened) -> None:
        """Take from a load how long it took here, and what more memory.

        Measured, a model takes up to 0.8 MB more in an agent that serves than in a process of its own. Whoever else
        worked meanwhile is counted, too, so the figure errs on the safe side, and only so far.
        """
        known = self.footprint
        most_bytes = round(self.measured_bytes * _GROWN_SHARE) + _GROWN_BYTES
        resident_bytes = max(known.resident_bytes, min(opened.grown_bytes, most_bytes))
        peak_bytes = known.peak_bytes + resident_bytes - known.resident_bytes
        load_s = (known.load_s + opened.load_s) / 2 if known.load_s else opened.load_s
        self.footprint = Footprint(resident_bytes, peak_bytes, load_s)

    @property
    def name(self) -> str:
        return self.model.manifest.model

    def residency(self) -> "Residency":
        return Residency(self.model, self.phase, self.taken_bytes, self._why_not(), self.is_parked, bool(self.problem))

    def _why_not(self) -> str:
        match self.phase:
            case Phase.RESIDENT:
                return ""
            case Phase.LOADING:
                return "is being loaded"
            case Phase.LEAVING:
                return "finishes what it has, then makes room for others"
        if self.is_parked:
            return "unloaded by hand"
        return f"could not be loaded: {self.problem}" if self.problem else "not resident: a request brings it in"

    @property
    def never_leaves(self) -> bool:
        return self.is_pinned or self.is_kept or self.open is None


@dataclass(slots=True, eq=False)
class Want:
    berth: Berth
    since_s: float
    # Whose place it takes; stays beside it if the budget allows.
    replaces: Berth | None = None
    waiters: list["asyncio.Future[None]"] = field(default_factory=list)

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits who said so, and not just a request."""
        return bool(self.waiters)


@dataclass(frozen=True, slots=True)
class Residency:
    """How a hosted model is at this moment; `reason` says why it is not in memory."""

    model: LoadedModel
    phase: Phase
    taken_bytes: int
    reason: str
    is_parked: bool
    has_failed: bool

    @property
    def would_answer(self) -> bool:
        """Whether a request would be answered, if need be by a model that it brings into memory first."""
        return not (self.is_parked or self.has_failed)

    def index_entry(self) -> ModelIndexEntry:
        name, reason = self.model.manifest.model, self.reason[:_MAX_REASON_CHARS]
        return ModelIndexEntry(name, self.model.version, _INDEX_STATES[self.phase], reason)


_INDEX_STATES = {
    Phase.COLD: "UNAVAILABLE",
    Phase.LOADING: "LOADING",
    Phase.RESIDENT: "READY",
    Phase.LEAVING: "UNLOADING",
}
