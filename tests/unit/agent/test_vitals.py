"""Watch: what it notes of runs, and that it changes nothing about them."""

import numpy as np
import pytest

from core.errors import InternalError, InvalidTensor
from core.tensors import Array
from edge_agent.runtime.vitals import Run, Vitals, Watch

INPUTS: list[Array] = [np.ones((4, 2), np.float32)]
NAN: list[Array] = [np.full((4, 2), np.nan, np.float32)]


def watch(run: Run, *, times_s: list[float] | None = None) -> Watch:
    ticks = iter(times_s or [0.0] * 100)
    return Watch(run, now_s=lambda: next(ticks), shares_runs=True, on_stop=lambda: None)


def failing(error: Exception) -> Run:
    def run(_: object) -> list[Array]:
        raise error

    return run


def test_a_run_is_passed_on_and_counted() -> None:
    found = watch(lambda inputs: inputs)
    assert found.run(INPUTS) is INPUTS
    assert found.vitals() == Vitals(runs=1, p95_s=0.0)


def test_a_failure_of_the_model_is_counted_and_passed_on() -> None:
    found = watch(failing(InternalError("no")))
    with pytest.raises(InternalError):
        found.run(INPUTS)
    assert found.vitals() == Vitals(runs=1, failed_runs=1)


def test_what_the_caller_did_wrong_says_nothing_about_the_model() -> None:
    found = watch(failing(InvalidTensor("no")))
    with pytest.raises(InvalidTensor):
        found.run(INPUTS)
    assert found.vitals() == Vitals()


def test_numbers_that_are_not_finite_count_unless_they_were_given() -> None:
    found = watch(lambda _: NAN)
    found.run(INPUTS)
    found.run(NAN)
    assert found.vitals().non_finite_runs == 1


def test_a_joint_run_is_timed_per_row() -> None:
    found = watch(lambda inputs: inputs, times_s=[1.0, 1.4])
    found.run(INPUTS)
    assert found.vitals().p95_s == pytest.approx(0.1)
