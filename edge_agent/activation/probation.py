"""Whether a variant that serves on probation stays, goes, or is watched further. Pure.

It stays after `duration_s` of serving or `runs` runs, whichever is first, unless one of these holds: too many runs
failed, too many gave numbers that are not finite (though what they were given was), a run is slower than the manifest
allows, or the agent itself was kept from its work. The last is how a model shows that starves reporting: a good agent
whose network is away is not the model's doing, so the connection to the controller has no say. Crashes are counted
where they can be, at the next start (`record`).

No traffic is no evidence against a model: it stays when its time is over.
"""

from dataclasses import dataclass

from core.errors import ErrorCode
from core.fleet_state import Problem
from edge_agent.runtime.vitals import Vitals


@dataclass(frozen=True, slots=True)
class ProbationTerms:
    duration_s: float = 600.0
    runs: int = 1000
    # Chosen: one malformed device among twenty must not fail a model for all others.
    max_failure_ratio: float = 0.05
    # Fewer runs say nothing about ratios and percentiles.
    min_runs: int = 20
    # The loop was kept from its work this often, each time for longer than `stall_s`.
    max_stalls: int = 3
    stall_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen of a variant since its switch, over all restarts; `max_latency_p95_s` is the manifest's bound."""

    ran_s: float
    vitals: Vitals
    stalls: int = 0
    max_latency_p95_s: float | None = None


@dataclass(frozen=True, slots=True)
class KeepWatching:
    pass


@dataclass(frozen=True, slots=True)
class Commit:
    pass


@dataclass(frozen=True, slots=True)
class RollBack:
    problem: Problem


Ruling = KeepWatching | Commit | RollBack


def judge(evidence: Evidence, terms: ProbationTerms) -> Ruling:
    why = _fault(evidence, terms)
    if why is not None:
        return RollBack(Problem(ErrorCode.FORBIDDEN, f"failed its probation: {why}"))
    if evidence.ran_s >= terms.duration_s or evidence.vitals.runs >= terms.runs:
        return Commit()
    return KeepWatching()


def _fault(evidence: Evidence, terms: ProbationTerms) -> str | None:
    if evidence.stalls >= terms.max_stalls:
        return f"the agent was kept from its work {evidence.stalls} times for more than {terms.stall_s:g} s"
    vitals = evidence.vitals
    if vitals.runs < terms.min_runs:
        return None
    allowed_runs = vitals.runs * terms.max_failure_ratio
    if vitals.failed_runs > allowed_runs:
        return f"expected at most {allowed_runs:g} of {vitals.runs} runs to fail, got {vitals.failed_runs}"
    if vitals.non_finite_runs > allowed_runs:
        return f"expected finite numbers, got others in {vitals.non_finite_runs} of {vitals.runs} runs"
    return _slowness(vitals.p95_s, evidence.max_latency_p95_s)


def _slowness(p95_s: float | None, allowed_s: float | None) -> str | None:
    if p95_s is None or allowed_s is None or p95_s <= allowed_s:
        return None
    return f"expected 95 of 100 runs within {allowed_s * 1e3:.3g} ms, they took {p95_s * 1e3:.3g} ms"
