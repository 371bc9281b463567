"""What is traced although it was not sampled, and how much of it."""

from hypothesis import given
from hypothesis import strategies as st

from core.keeping import KEEP_BURST, Keep, Keeper, KeepRule
from core.telemetry import ancestry_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def permitted(keeper: Keeper, keep: Keep, *, count: int, now_s: float = 0.0, error_type: str = "") -> int:
    return sum(keeper.permits(keep, now_s=now_s, error_type=error_type) for _ in range(count))


def test_the_first_of_an_incident_are_kept_and_then_the_rate_rules() -> None:
    keeper = Keeper(KeepRule(slow_s=1.0, per_s=0.5))
    assert permitted(keeper, Keep.ESCALATED, count=100) == KEEP_BURST
    assert permitted(keeper, Keep.ESCALATED, count=100, now_s=4.0) == 2


def test_one_kind_of_trouble_does_not_hide_another() -> None:
    keeper = Keeper(KeepRule(slow_s=1.0, per_s=0.5))
    permitted(keeper, Keep.ESCALATED, count=100)
    permitted(keeper, Keep.ERROR, count=100, error_type="overloaded")
    assert keeper.permits(Keep.SLOW, now_s=0.0)
    assert keeper.permits(Keep.ERROR, now_s=0.0, error_type="unavailable")
    assert not keeper.permits(Keep.ERROR, now_s=0.0, error_type="overloaded")


def test_a_rate_of_zero_keeps_nothing_and_finds_nothing_slow() -> None:
    keeper = Keeper(KeepRule(slow_s=1.0, per_s=0.0))
    assert permitted(keeper, Keep.ERROR, count=10) == 0
    assert keeper.slow_s > 1e9


def test_kinds_of_errors_without_end_take_no_memory_without_end() -> None:
    keeper = Keeper(KeepRule(slow_s=1.0, per_s=1.0))
    kept = sum(keeper.permits(Keep.ERROR, now_s=0.0, error_type=f"Defect{number}") for number in range(10_000))
    assert kept < 100


@given(
    st.floats(0.01, 100),
    st.lists(st.tuples(st.floats(0, 10), st.sampled_from(["escalated", "unavailable", "internal"])), max_size=200),
)
def test_whatever_comes_no_kind_is_kept_more_often_than_its_rate(per_s: float, asks: list[tuple[float, str]]) -> None:
    keeper = Keeper(KeepRule(slow_s=1.0, per_s=per_s))
    now_s, kept = 0.0, dict.fromkeys(("escalated", "unavailable", "internal"), 0)
    for passed_s, kind in asks:
        now_s += passed_s
        kept[kind] += keeper.permits(Keep.ERROR, now_s=now_s, error_type=kind)
    assert max(kept.values()) <= KEEP_BURST + now_s * per_s + 1e-6


def test_a_caller_that_says_not_sampled_is_linked_to_and_not_continued() -> None:
    context, (link,) = ancestry_of(f"00-{TRACE}-{SPAN}-00")
    assert not context
    assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == (TRACE, SPAN)


def test_a_caller_that_records_is_continued() -> None:
    context, links = ancestry_of(f"00-{TRACE}-{SPAN}-01")
    assert context
    assert links == ()


def test_without_a_caller_a_trace_begins_here() -> None:
    assert ancestry_of(None) == ({}, ())
    assert ancestry_of("malformed") == ({}, ())
