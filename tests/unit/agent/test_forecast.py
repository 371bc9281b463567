"""How long the heavy tier will take: measured, in a window, and never so sure that nobody looks again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.cascade.forecast import Forecast, ForecastPolicy

POLICY = ForecastPolicy(window=16, max_age_s=30.0, probe_interval_s=2.0)


def forecast_of(*durations: float, at_s: float = 0.0, policy: ForecastPolicy = POLICY) -> Forecast:
    forecast = Forecast(policy)
    for took_s in durations:
        forecast.observe(took_s, now_s=at_s)
    return forecast


def test_without_a_round_trip_nothing_is_known_and_everybody_may_ask() -> None:
    assert forecast_of().expected_s(0) is None
    assert forecast_of().permits(1e-9, now_s=0)


def test_nine_of_ten_round_trips_are_no_longer_than_expected() -> None:
    assert forecast_of(*[0.1] * 9, 5.0).expected_s(0) == 0.1
    assert forecast_of(*[0.1] * 8, 5.0, 5.0).expected_s(0) == 5.0


def test_what_fits_may_ask_and_what_does_not_fit_may_not() -> None:
    forecast = forecast_of(*[0.1] * 5)
    assert forecast.permits(0.11, now_s=0)
    assert not forecast.permits(0.09, now_s=0)


def test_after_a_timeout_a_request_with_hardly_more_time_may_not_ask() -> None:
    forecast = forecast_of()
    forecast.observe_timeout(0.1, now_s=0)
    assert not forecast.permits(0.105, now_s=0)
    assert forecast.permits(0.2, now_s=0)


def test_only_the_latest_round_trips_count() -> None:
    forecast = forecast_of(*[5.0] * 16, *[0.1] * 16)
    assert forecast.expected_s(0) == 0.1


def test_what_is_old_counts_no_more() -> None:
    forecast = forecast_of(5.0)
    assert forecast.expected_s(29.9) == 5.0
    assert forecast.expected_s(30.0) is None
    assert forecast.permits(0.05, now_s=30.0)


def test_while_nothing_fits_one_request_now_and_then_looks() -> None:
    forecast = forecast_of(5.0)
    asked = [now_s for now_s in range(10) if forecast.permits(0.05, now_s=now_s)]
    assert asked == [2, 4, 6, 8]


def test_a_round_trip_that_was_measured_just_now_needs_no_probe() -> None:
    forecast = forecast_of(5.0)
    for now_s in range(1, 10):
        forecast.observe(5.0, now_s=now_s)
        assert not forecast.permits(0.05, now_s=now_s + 0.5)


def test_a_tier_that_has_recovered_is_asked_again_within_the_age_of_its_last_slow_answer() -> None:
    """Every request has 200 ms; the tier, which hung until second 0, answers in 20 ms from then on."""
    forecast = forecast_of()
    for _ in range(16):
        forecast.observe_timeout(0.2, now_s=0)
    back_s = math.inf
    for tick in range(1, 400):
        now_s = tick / 10
        if forecast.permits(0.2, now_s=now_s):
            forecast.observe(0.02, now_s=now_s)
        expected_s = forecast.expected_s(now_s)
        if expected_s is not None and expected_s < 0.2:
            back_s = min(back_s, now_s)
    assert back_s <= POLICY.max_age_s


def test_a_request_with_enough_time_brings_the_estimate_up_to_date() -> None:
    forecast = forecast_of(5.0)
    for _ in range(10):
        assert forecast.permits(10.0, now_s=1.0)
        forecast.observe(0.02, now_s=1.0)
    assert forecast.permits(0.05, now_s=1.0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_the_expected_time_is_one_that_was_measured_and_few_are_longer(durations: list[float]) -> None:
    expected_s = forecast_of(*durations).expected_s(0)
    latest = durations[-POLICY.window :]
    assert expected_s in latest
    assert expected_s is not None
    assert sum(took_s > expected_s for took_s in latest) <= 0.1 * len(latest)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 10), st.booleans()), max_size=60),
    st.floats(0.001, 10),
)
def test_whatever_was_measured_nobody_is_kept_away_for_longer_than_a_probe_takes(
    steps: list[tuple[float, float, bool]], budget_s: float
) -> None:
    forecast, now_s = Forecast(POLICY), 0.0
    for pause_s, took_s, is_measured in steps:
        now_s += pause_s
        if is_measured:
            forecast.observe(took_s, now_s=now_s)
        else:
            forecast.permits(budget_s, now_s=now_s)
    assert any(forecast.permits(budget_s, now_s=now_s + wait_s) for wait_s in (0.0, POLICY.probe_interval_s + 1e-6))


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 128])
def test_the_percentile_is_that_of_the_nearest_rank(count: int) -> None:
    forecast = forecast_of(*[float(number) for number in range(1, count + 1)], policy=ForecastPolicy())
    assert forecast.expected_s(0) == math.ceil(0.9 * count)
