"""The planner, alone: from any state, its steps reach the desired one and then there is nothing left to do."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from hypothesis import given
from hypothesis import strategies as st

from core.digest import Digest, digest_of
from core.fleet_state import Slot
from core.ids import ModelName, VariantName
from edge_agent.reconcile.planner import Current, FetchSlot, LoadSlot, SelfTestSlot, Step, UnloadModel, plan

A, B, C = (ModelName(name) for name in "abc")


def digest(number: int) -> Digest:
    return digest_of(str(number).encode())


def slot(model: ModelName, number: int) -> Slot:
    return Slot(model, number + 1, VariantName("int8"), digest(number))


def after(current: Current, step: Step) -> Current:
    """Return what is once `step` has been taken."""
    match step:
        case FetchSlot(wanted):
            return replace(current, complete=current.complete | {wanted.manifest_digest})
        case SelfTestSlot(wanted):
            assert wanted.manifest_digest in current.complete, "tried before it was fetched"
            return replace(current, tested=current.tested | {wanted.manifest_digest})
        case LoadSlot(wanted):
            assert wanted.manifest_digest in current.complete, "loaded before it was fetched"
            assert wanted.manifest_digest in current.tested, "loaded before it was tried"
            assert wanted.manifest_digest not in current.fallbacks, "loaded although it is in quarantine"
            return replace(current, running={**current.running, wanted.model: wanted.manifest_digest})
        case UnloadModel(model):
            assert model in current.running, "unloaded although it did not run"
            return replace(current, running={name: ran for name, ran in current.running.items() if name != model})
        case _:
            assert_never(step)


models = st.sampled_from([A, B, C, ModelName("d")])
digests = st.integers(0, 5).map(digest)
currents = st.builds(Current, st.frozensets(digests), st.dictionaries(models, digests), st.frozensets(digests))
desired_slots = st.dictionaries(models, st.integers(0, 5)).map(
    lambda wanted: tuple(slot(model, number) for model, number in wanted.items())
)


@given(desired_slots, currents)
def test_taking_every_step_reaches_the_desired_state_and_leaves_nothing_to_do(
    slots: Sequence[Slot], current: Current
) -> None:
    for step in plan(slots, current):
        current = after(current, step)
    assert dict(current.running) == {wanted.model: wanted.manifest_digest for wanted in slots}
    assert {wanted.manifest_digest for wanted in slots} <= current.complete
    assert plan(slots, current) == ()


@given(desired_slots, currents)
def test_taking_only_the_first_step_of_each_new_plan_gets_there_too(slots: Sequence[Slot], current: Current) -> None:
    taken = 0
    while steps := plan(slots, current):
        current = after(current, steps[0])
        taken += 1
        assert taken <= 4 * 4, "the plan does not come to an end"
    assert dict(current.running) == {wanted.model: wanted.manifest_digest for wanted in slots}


@given(desired_slots, currents, st.frozensets(models))
def test_no_step_touches_a_model_on_hold(
    slots: Sequence[Slot], current: Current, on_hold: frozenset[ModelName]
) -> None:
    assert not {step.model for step in plan(slots, current, on_hold=on_hold)} & on_hold


@given(desired_slots, currents)
def test_a_model_that_stays_is_never_unloaded(slots: Sequence[Slot], current: Current) -> None:
    unloaded = {step.model for step in plan(slots, current) if isinstance(step, UnloadModel)}
    assert not unloaded & {wanted.model for wanted in slots}


def test_what_is_stored_is_loaded_before_anything_is_fetched() -> None:
    current = Current(frozenset({digest(2)}), {}, tested=frozenset({digest(2)}))
    assert plan([slot(A, 1), slot(B, 2)], current) == (
        LoadSlot(slot(B, 2)),
        FetchSlot(slot(A, 1)),
        SelfTestSlot(slot(A, 1)),
        LoadSlot(slot(A, 1)),
    )


def test_a_model_is_taken_away_only_after_all_others_were_loaded() -> None:
    current = Current(frozenset(), {C: digest(3)})
    assert plan([slot(A, 1)], current)[-1] == UnloadModel(C)


def test_a_running_model_whose_bytes_are_lost_is_fetched_but_not_loaded_again() -> None:
    assert plan([slot(A, 1)], Current(frozenset(), {A: digest(1)})) == (FetchSlot(slot(A, 1)),)


def test_one_slot_on_hold_does_not_stop_the_others() -> None:
    steps = plan([slot(A, 1), slot(B, 2)], Current(frozenset(), {C: digest(3)}), on_hold={A})
    assert steps == (FetchSlot(slot(B, 2)), SelfTestSlot(slot(B, 2)), LoadSlot(slot(B, 2)), UnloadModel(C))


fallbacks = st.dictionaries(digests, st.none() | st.integers(0, 5).map(lambda number: slot(A, number)))


@given(desired_slots, currents, fallbacks)
def test_nothing_in_quarantine_is_started_and_the_plan_comes_to_an_end(
    slots: Sequence[Slot], current: Current, quarantine: Mapping[Digest, Slot | None]
) -> None:
    own = {
        found: None if fallback is None else replace(fallback, model=wanted.model)
        for wanted in slots
        for found, fallback in quarantine.items()
        if wanted.manifest_digest == found
    }
    current, taken = replace(current, fallbacks=own), 0
    while steps := plan(slots, current):
        current = after(current, steps[0])
        taken += 1
        assert taken <= 4 * 4, "the plan does not come to an end"


def test_a_model_in_quarantine_gives_way_to_what_ran_before_it() -> None:
    stored = frozenset({digest(1), digest(2)})
    current = Current(stored, {A: digest(2)}, tested=stored, fallbacks={digest(2): slot(A, 1)})
    assert plan([slot(A, 2)], current) == (LoadSlot(slot(A, 1)),)


def test_a_model_in_quarantine_that_follows_nothing_is_taken_away() -> None:
    current = Current(frozenset({digest(2)}), {A: digest(2)}, fallbacks={digest(2): None})
    assert plan([slot(A, 2)], current) == (UnloadModel(A),)


def test_what_runs_in_good_standing_is_not_given_up_for_what_ran_before_something_in_quarantine() -> None:
    stored = frozenset({digest(1), digest(2), digest(3)})
    current = Current(stored, {A: digest(3)}, tested=stored, fallbacks={digest(2): slot(A, 1)})
    assert plan([slot(A, 2)], current) == ()


def test_what_passed_its_self_test_is_not_tried_again() -> None:
    stored = frozenset({digest(1)})
    assert plan([slot(A, 1)], Current(stored, {}, tested=stored)) == (LoadSlot(slot(A, 1)),)
