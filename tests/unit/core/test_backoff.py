"""Full jitter: every delay is uniform between nothing and a ceiling that doubles up to the cap."""

from hypothesis import given
from hypothesis import strategies as st

from core.backoff import Backoff, BackoffPolicy
from tests.support.open_inference_strategies import PATIENT

POLICY = BackoffPolicy(base_s=1.0, cap_s=10.0)


def test_the_ceiling_doubles_up_to_the_cap() -> None:
    backoff = Backoff(POLICY, uniform=lambda: 1.0)
    assert [backoff.next_delay_s() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_success_starts_over() -> None:
    backoff = Backoff(POLICY, uniform=lambda: 1.0)
    backoff.next_delay_s()
    backoff.next_delay_s()
    backoff.reset()
    assert backoff.next_delay_s() == 1.0


def test_the_jitter_is_full() -> None:
    draws = iter([0.0, 0.5, 0.999])
    backoff = Backoff(POLICY, uniform=lambda: next(draws))
    assert [backoff.next_delay_s() for _ in range(3)] == [0.0, 1.0, 3.996]


@PATIENT
@given(st.floats(0, 1000), st.floats(0, 1000), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=100))
def test_no_delay_is_negative_or_over_its_ceiling(base_s: float, cap_s: float, draws: list[float]) -> None:
    source = iter(draws)
    backoff = Backoff(BackoffPolicy(base_s=base_s, cap_s=cap_s), uniform=lambda: next(source))
    for attempt in range(len(draws)):
        assert 0 <= backoff.next_delay_s() <= min(cap_s, base_s * 2.0**attempt)


def test_an_outage_without_end_overflows_nothing() -> None:
    backoff = Backoff(POLICY)
    assert all(backoff.next_delay_s() <= 10.0 for _ in range(5000))
