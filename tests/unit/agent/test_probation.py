"""Probation: numbers in, a ruling out."""

import pytest

from edge_agent.activation.probation import Commit, Evidence, KeepWatching, ProbationTerms, RollBack, Ruling, judge
from edge_agent.runtime.vitals import Vitals

TERMS = ProbationTerms(duration_s=600, runs=1000, max_failure_ratio=0.05, min_runs=20, max_stalls=3)


def ruling(vitals: Vitals, *, ran_s: float = 60, stalls: int = 0, bound_s: float | None = None) -> Ruling:
    return judge(Evidence(ran_s, vitals, stalls, bound_s), TERMS)


def reason(found: Ruling) -> str:
    assert isinstance(found, RollBack)
    return found.problem.message


def test_a_sound_variant_is_watched_until_its_time_is_over() -> None:
    assert ruling(Vitals(runs=100)) == KeepWatching()
    assert ruling(Vitals(runs=100), ran_s=600) == Commit()


def test_enough_runs_end_it_sooner() -> None:
    assert ruling(Vitals(runs=1000), ran_s=1) == Commit()


def test_no_traffic_is_no_evidence_against_it() -> None:
    assert ruling(Vitals(), ran_s=600) == Commit()


def test_too_many_failed_runs_are_a_reason() -> None:
    assert "expected at most 5 of 100 runs to fail, got 6" in reason(ruling(Vitals(runs=100, failed_runs=6)))


def test_as_many_failures_as_are_allowed_are_none() -> None:
    assert ruling(Vitals(runs=100, failed_runs=5)) == KeepWatching()


def test_a_few_runs_say_nothing() -> None:
    assert ruling(Vitals(runs=19, failed_runs=19)) == KeepWatching()


def test_numbers_that_are_not_finite_are_a_reason() -> None:
    assert "others in 50 of 100 runs" in reason(ruling(Vitals(runs=100, non_finite_runs=50)))


@pytest.mark.parametrize(("p95_s", "is_sound"), [(0.050, True), (0.051, False), (None, True)])
def test_slow_runs_are_a_reason_where_the_manifest_says_what_slow_is(p95_s: float | None, is_sound: bool) -> None:
    found = ruling(Vitals(runs=100, p95_s=p95_s), bound_s=0.050)
    assert isinstance(found, KeepWatching if is_sound else RollBack)


def test_without_a_bound_no_run_is_too_slow() -> None:
    assert ruling(Vitals(runs=100, p95_s=9.0)) == KeepWatching()


def test_an_agent_that_was_kept_from_its_work_is_a_reason() -> None:
    assert "kept from its work 3 times" in reason(ruling(Vitals(), stalls=3))


def test_a_fault_counts_also_when_the_time_is_over() -> None:
    assert isinstance(ruling(Vitals(runs=100, failed_runs=6), ran_s=600), RollBack)
