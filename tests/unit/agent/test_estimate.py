"""What is expected of runs, and when it pays to wait for a fuller one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.runtime.estimate import ArrivalRate, RunTimes
from edge_agent.runtime.forecast import Forecast
from edge_agent.runtime.job import NEVER
from edge_agent.runtime.session import RunTime

# 10 ms whatever the rows, and 0.1 ms for each.
FIXED = RunTime(0.0101, 0.0132)


def times(measured: RunTime = FIXED, *, max_batch: int = 32) -> RunTimes:
    return RunTimes(measured, max_batch=max_batch)


def waits_for(
    waiting: int, rate_per_s: float, *, measured: RunTime = FIXED, max_wait_s: float = 1.0, slack_s: float = 1.0
) -> int:
    return times(measured).rows_worth_waiting_for(
        waiting, rate_per_s=rate_per_s, max_wait_s=max_wait_s, slack_s=slack_s
    )


def test_between_one_row_and_a_full_batch_the_time_is_interpolated() -> None:
    line = times(RunTime(1.0, 4.0), max_batch=4)
    assert [line.expected_s(rows) for rows in (1, 2, 4)] == [1.0, 2.0, 4.0]


def test_many_rows_take_full_batches_and_a_rest() -> None:
    line = times(RunTime(1.0, 4.0), max_batch=4)
    assert line.expected_for_all_s(9) == 4.0 + 4.0 + 1.0
    assert times(RunTime(2.0, 2.0), max_batch=1).expected_for_all_s(3) == 6.0


@given(st.lists(st.integers(1, 32), min_size=200, max_size=200))
def test_the_line_finds_the_machine_as_it_is_now(sizes: list[int]) -> None:
    line = times(RunTime(0.001, 0.002))
    for rows in [*sizes, *([1, 32] * 100)]:
        line.observe(rows, 0.02 + 0.001 * rows)
    assert line.expected_s(1) == pytest.approx(0.021, rel=0.01)
    assert line.expected_s(32) == pytest.approx(0.052, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 32), st.floats(0, 100)), max_size=100))
def test_whatever_is_observed_no_run_is_expected_to_take_less_for_more_rows(runs: list[tuple[int, float]]) -> None:
    line = times()
    for rows, took_s in runs:
        line.observe(rows, took_s)
    assert 0 <= line.single_s <= line.full_s


def test_one_run_that_was_held_up_hardly_counts() -> None:
    line = times(RunTime(0.01, 0.01), max_batch=1)
    line.observe(1, 5.0)
    assert line.single_s == pytest.approx(0.0125)


def test_a_model_that_was_never_measured_is_believed_at_its_first_run() -> None:
    line = times(RunTime(0.0, 0.0), max_batch=1)
    line.observe(1, 0.5)
    assert line.single_s == 0.5


def test_the_rate_follows_what_comes() -> None:
    rate = ArrivalRate()
    for turn in range(50):
        rate.look(5, now_s=turn * 0.01)
    assert rate.per_s == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize(("waiting", "rate_per_s"), [(1, 0.0), (1, 50.0), (1, 99.0), (16, 1000.0)])
def test_nobody_waits_when_the_next_row_is_further_away_than_a_run(waiting: int, rate_per_s: float) -> None:
    assert waits_for(waiting, rate_per_s) == 0


def test_a_caller_that_asks_again_only_when_it_is_answered_never_waits() -> None:
    assert waits_for(1, 1 / FIXED.single_s) == 0


def test_a_batch_waits_for_as_many_rows_as_make_the_average_answer_soonest() -> None:
    def total_s(more: int) -> float:
        line, together = times(), 1 + more
        if not more:
            return 0.0
        apart = together * line.expected_s(1) + more * line.expected_s(more)
        return together * (more / 1000 + line.expected_s(together)) - apart

    best = min(range(32), key=total_s)
    assert waits_for(1, 1000.0) == pytest.approx(best, abs=1)
    assert best > 1


def test_the_setting_bounds_the_wait() -> None:
    assert waits_for(1, 1000.0, max_wait_s=0.002) == 2
    assert waits_for(1, 1000.0, max_wait_s=0.0) == 0


def test_a_deadline_bounds_the_wait() -> None:
    assert waits_for(1, 1000.0, slack_s=0.0125) == 2
    assert waits_for(1, 1000.0, slack_s=0.005) == 0


def test_rows_that_cost_as_much_together_as_alone_are_not_waited_for() -> None:
    assert waits_for(1, 10_000.0, measured=RunTime(0.01, 0.32)) == 0


@given(
    waiting=st.integers(1, 32),
    rate_per_s=st.floats(0, 1e6),
    single_s=st.floats(0, 1),
    more_s=st.floats(0, 1),
    max_wait_s=st.floats(0, 1),
    slack_s=st.floats(-1, 1),
)
def test_no_wait_passes_a_bound(
    waiting: int, rate_per_s: float, single_s: float, more_s: float, max_wait_s: float, slack_s: float
) -> None:
    measured = RunTime(single_s, single_s + more_s)
    more = waits_for(waiting, rate_per_s, measured=measured, max_wait_s=max_wait_s, slack_s=slack_s)
    assert 0 <= more <= 32 - waiting
    if more:
        assert more / rate_per_s <= max_wait_s
        assert more / rate_per_s + times(measured).expected_s(waiting + more) <= slack_s


def test_part_of_a_deadline_is_kept_back_for_the_reply_and_never_most_of_it() -> None:
    forecast = Forecast(FIXED, max_batch=1, reserve_s=0.02)
    assert forecast.due_s(100.2, now_s=100.0) == pytest.approx(100.18)
    assert forecast.due_s(100.02, now_s=100.0) == pytest.approx(100.015)
    assert forecast.due_s(NEVER, now_s=100.0) == NEVER


def test_what_is_ahead_and_under_way_comes_before_a_newcomer_and_may_take_a_little_longer() -> None:
    forecast = Forecast(RunTime(1.0, 1.0), max_batch=1, reserve_s=0.0)
    assert forecast.finish_s(1, ahead=2, now_s=100.0) == 103.5
    forecast.started(1, wanted_s=100.0, now_s=100.0)
    assert forecast.finish_s(1, ahead=2, now_s=100.25) == 104.5
    forecast.ended(1, started_s=100.0, now_s=101.0)
    assert forecast.finish_s(1, ahead=0, now_s=101.0) == 102.0


def test_while_other_models_have_the_threads_every_batch_waits_for_its_turn() -> None:
    forecast = Forecast(RunTime(1.0, 1.0), max_batch=1, reserve_s=0.0)
    for start_s in range(0, 100, 3):
        forecast.started(1, wanted_s=start_s, now_s=start_s + 2)
        forecast.ended(1, started_s=start_s + 2, now_s=start_s + 3)
    assert forecast.finish_s(1, ahead=1, now_s=200.0) == pytest.approx(207.25, abs=0.1)


def test_nobody_is_sent_away_for_less_than_a_run_or_longer_than_half_a_minute() -> None:
    forecast = Forecast(RunTime(0.5, 0.5), max_batch=1, reserve_s=0.0)
    assert [forecast.retry_after_s(excess_s) for excess_s in (0.0, 2.0, 1e9)] == [0.5, 2.0, 30.0]
