"""The breaker: open after failures in a row, one probe at a time, closed by its success."""

import pytest

from core.breaker import Breaker, BreakerPolicy, BreakerState


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(BreakerPolicy(failures_to_open=2, open_s=10.0))


def opened(breaker: Breaker, *, at_s: float) -> Breaker:
    breaker.failed(at_s)
    breaker.failed(at_s)
    return breaker


def test_it_opens_after_failures_in_a_row_only(breaker: Breaker) -> None:
    breaker.failed(0)
    breaker.succeeded()
    breaker.failed(1)
    assert breaker.permits(1)
    breaker.failed(2)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.permits(2)


def test_half_open_lets_one_probe_through(breaker: Breaker) -> None:
    opened(breaker, at_s=0)
    assert [breaker.permits(now_s) for now_s in (9.9, 10.0, 10.0, 99.0)] == [False, True, False, False]
    assert breaker.state is BreakerState.HALF_OPEN


def test_a_probe_that_succeeds_closes_it_and_forgets_the_failures(breaker: Breaker) -> None:
    assert opened(breaker, at_s=0).permits(10)
    breaker.succeeded()
    breaker.failed(11)
    assert breaker.state is BreakerState.CLOSED


def test_a_probe_that_fails_opens_it_for_another_period(breaker: Breaker) -> None:
    assert opened(breaker, at_s=0).permits(10)
    breaker.failed(12)
    assert [breaker.permits(now_s) for now_s in (21.9, 22.0)] == [False, True]


def test_a_probe_that_tells_nothing_lets_the_next_one_through(breaker: Breaker) -> None:
    assert opened(breaker, at_s=0).permits(10)
    breaker.abandoned()
    assert breaker.permits(10)


def test_a_late_failure_does_not_keep_it_open_for_longer(breaker: Breaker) -> None:
    opened(breaker, at_s=0)
    breaker.failed(9)
    assert breaker.permits(10)


def test_it_tells_whether_it_would_refuse_without_taking_the_probe(breaker: Breaker) -> None:
    assert not breaker.refuses(0)
    opened(breaker, at_s=0)
    assert [breaker.refuses(now_s) for now_s in (0, 9.9, 10.0, 10.0)] == [True, True, False, False]
    assert breaker.permits(10)
    assert breaker.refuses(10)
    breaker.succeeded()
    assert not breaker.refuses(10)
