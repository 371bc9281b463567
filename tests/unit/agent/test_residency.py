"""Whether one more model has room in memory, and who leaves for it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.runtime.residency import (
    Admit,
    Frequencies,
    Need,
    Refuse,
    ResidencyTerms,
    Resident,
    Room,
    Wait,
    make_room,
)

TERMS = ResidencyTerms(budget_bytes=100, protect_s=1.0, protect_loads=2.0)
LONG_AGO_S, NOW_S = 0.0, 100.0


def resident(name: str, size_bytes: int, **more: object) -> Resident:
    return replace(Resident(name, size_bytes, load_s=0.1, loaded_at_s=LONG_AGO_S), **more)  # type: ignore[arg-type]  # by name


def room(need_bytes: int, *residents: Resident, waited_s: float = 0.0, available_bytes: int | None = None) -> Room:
    need = Need("new", need_bytes, load_s=0.1, waited_s=waited_s)
    return make_room(need, residents, TERMS, now_s=NOW_S, available_bytes=available_bytes)


def test_who_fits_beside_the_others_comes_in() -> None:
    assert room(40, resident("a", 30), resident("b", 30)) == Admit()


def test_who_is_worth_least_leaves() -> None:
    asked = {"rarely": 1.0, "often": 9.0}
    found = room(50, *(resident(name, 40, frequency=count) for name, count in asked.items()))
    assert found == Admit(("rarely",))


def test_a_byte_of_a_small_model_asked_as_often_is_worth_more() -> None:
    assert room(50, resident("large", 60, frequency=2), resident("small", 20, frequency=2)) == Admit(("large",))


def test_a_model_that_is_slow_to_load_is_worth_more() -> None:
    slow, quick = resident("slow", 40, frequency=1, load_s=0.4), resident("quick", 40, frequency=1)
    assert room(50, slow, quick) == Admit(("quick",))


def test_of_those_nobody_asked_for_the_oldest_leaves() -> None:
    assert room(50, resident("new", 40, loaded_at_s=9.0), resident("old", 40, loaded_at_s=1.0)) == Admit(("old",))


def test_nobody_leaves_who_need_not() -> None:
    small, large = resident("small", 10, frequency=1.0), resident("large", 80, frequency=99.0)
    assert room(90, small, large) == Admit(("large",))


def test_a_pinned_model_never_leaves() -> None:
    assert room(60, resident("pinned", 40, is_pinned=True), resident("other", 40, frequency=9.0)) == Admit(("other",))


def test_who_has_no_room_beside_the_pinned_is_refused_with_the_remedy() -> None:
    found = room(61, resident("pinned", 40, is_pinned=True))
    assert isinstance(found, Refuse)
    assert "expected at most 60 bytes" in found.reason
    assert "raise [residency] budget_bytes" in found.reason


def test_a_budget_smaller_than_one_model_refuses_it() -> None:
    assert isinstance(room(101), Refuse)


def test_a_busy_model_does_not_leave_for_a_newcomer() -> None:
    assert isinstance(room(50, resident("busy", 80, is_busy=True)), Wait)


def test_an_idle_model_of_great_worth_leaves_before_a_busy_one() -> None:
    idle, busy = resident("idle", 50, frequency=99.0), resident("busy", 50, is_busy=True)
    assert room(50, idle, busy, waited_s=1.0) == Admit(("idle",))


def test_who_was_just_loaded_does_not_leave_for_a_newcomer() -> None:
    assert isinstance(room(50, resident("young", 80, loaded_at_s=NOW_S - 0.9)), Wait)


def test_nobody_worth_more_leaves_because_one_worth_less_was_just_loaded() -> None:
    young, settled = resident("young", 80, loaded_at_s=NOW_S), resident("settled", 20, frequency=9.0)
    assert isinstance(room(15, young, settled), Wait)


def test_a_long_load_protects_for_longer() -> None:
    assert isinstance(room(50, resident("young", 80, loaded_at_s=NOW_S - 5, load_s=3.0)), Wait)
    assert room(50, resident("older", 80, loaded_at_s=NOW_S - 6, load_s=3.0)) == Admit(("older",))


def test_who_has_waited_for_as_long_takes_the_place_of_one_just_loaded() -> None:
    assert room(50, resident("young", 80, loaded_at_s=NOW_S), waited_s=1.0) == Admit(("young",))


def test_who_has_waited_takes_the_place_of_a_busy_one_when_no_other_will_do() -> None:
    assert room(50, resident("busy", 80, is_busy=True), waited_s=1.0) == Admit(("busy",))


def test_who_leaves_already_is_waited_for() -> None:
    assert isinstance(room(50, resident("leaving", 60, is_leaving=True), resident("other", 40)), Wait)


def test_a_machine_that_has_less_left_than_the_budget_evicts() -> None:
    assert room(50, resident("other", 40), available_bytes=20) == Admit(("other",))


def test_a_machine_without_memory_is_no_reason_to_give_up_for_good() -> None:
    found = room(50, available_bytes=10, waited_s=9.0)
    assert isinstance(found, Wait)
    assert "missing on this machine" in found.reason


RESIDENTS = st.lists(
    st.builds(
        Resident,
        name=st.uuids().map(str),
        size_bytes=st.integers(1, 40),
        load_s=st.floats(0, 2),
        frequency=st.floats(0, 50),
        loaded_at_s=st.floats(0, NOW_S),
        is_pinned=st.booleans(),
        is_busy=st.booleans(),
        is_leaving=st.booleans(),
    ),
    max_size=8,
)


@given(RESIDENTS, st.integers(1, 120), st.sampled_from([0.0, 0.5, 99.0]), st.none() | st.integers(0, 200))
def test_room_is_never_made_over_the_budget_nor_from_who_must_stay(
    residents: Sequence[Resident], need_bytes: int, waited_s: float, available_bytes: int | None
) -> None:
    found = room(need_bytes, *residents, waited_s=waited_s, available_bytes=available_bytes)
    if not isinstance(found, Admit):
        return
    taken_bytes = sum(one.size_bytes for one in residents)
    going = [one for one in residents if one.name in found.evicting]
    assert not any(one.is_pinned or one.is_leaving for one in going)
    assert waited_s or not any(one.is_busy for one in going)
    # Those that leave already are waited for, too, before the decider is asked again.
    left_bytes = taken_bytes - sum(one.size_bytes for one in residents if one in going or one.is_leaving)
    assert left_bytes + need_bytes <= TERMS.budget_bytes
    if not going:
        assert taken_bytes + need_bytes <= TERMS.budget_bytes
        assert available_bytes is None or need_bytes <= available_bytes


@given(RESIDENTS, st.integers(1, 100))
def test_who_fits_beside_the_pinned_and_has_waited_is_let_in_or_waits_for_who_leaves(
    residents: Sequence[Resident], need_bytes: int
) -> None:
    pinned_bytes = sum(one.size_bytes for one in residents if one.is_pinned)
    found = room(need_bytes, *residents, waited_s=99.0)
    if need_bytes + pinned_bytes > TERMS.budget_bytes:
        assert isinstance(found, Refuse)
    else:
        assert isinstance(found, Admit) or (found == Wait("others are leaving"))


def test_how_often_a_model_was_asked_halves_with_time() -> None:
    asked = Frequencies(half_life_s=10.0, now_s=0.0)
    asked.add({"a": 8, "b": 1}, now_s=0.0)
    asked.add({"b": 1}, now_s=20.0)
    assert (asked.of("a"), asked.of("b"), asked.of("c")) == pytest.approx((2.0, 1.25, 0.0))
