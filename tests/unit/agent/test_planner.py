"""The planner, alone: from any state, its steps reach the desired one and then there is nothing left to do."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from core.digest import Digest, digest_of
from core.fleet_state import Slot
from core.ids import ModelName, VariantName
from edge_agent.reconcile.planner import Current, FetchSlot, LoadSlot, Step, UnloadModel, plan

A, B, C = (ModelName(name) for name in "abc")


def digest(number: int) -> Digest:
    return digest_of(str(number).encode())


def slot(model: ModelName, number: int) -> Slot:
    return Slot(model, number + 1, VariantName("int8"), digest(number))


def after(current: Current, step: Step) -> Current:
    """Return what is once `step` has been taken."""
    match step:
        case FetchSlot(wanted):
            return Current(current.complete | {wanted.manifest_digest}, current.running)
        case LoadSlot(wanted):
            assert wanted.manifest_digest in current.complete, "loaded before it was fetched"
            return Current(current.complete, {**current.running, wanted.model: wanted.manifest_digest})
        case UnloadModel(model):
            assert model in current.running, "unloaded although it did not run"
            return Current(current.complete, {name: ran for name, ran in current.running.items() if name != model})


models = st.sampled_from([A, B, C, ModelName("d")])
digests = st.integers(0, 5).map(digest)
currents = st.builds(Current, st.frozensets(digests), st.dictionaries(models, digests))
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
        assert taken <= 3 * 4, "the plan does not come to an end"
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
    current = Current(frozenset({digest(2)}), {})
    assert plan([slot(A, 1), slot(B, 2)], current) == (
        LoadSlot(slot(B, 2)),
        FetchSlot(slot(A, 1)),
        LoadSlot(slot(A, 1)),
    )


def test_a_model_is_taken_away_only_after_all_others_were_loaded() -> None:
    current = Current(frozenset(), {C: digest(3)})
    assert plan([slot(A, 1)], current)[-1] == UnloadModel(C)


def test_a_running_model_whose_bytes_are_lost_is_fetched_but_not_loaded_again() -> None:
    assert plan([slot(A, 1)], Current(frozenset(), {A: digest(1)})) == (FetchSlot(slot(A, 1)),)


def test_one_slot_on_hold_does_not_stop_the_others() -> None:
    steps = plan([slot(A, 1), slot(B, 2)], Current(frozenset(), {C: digest(3)}), on_hold={A})
    assert steps == (FetchSlot(slot(B, 2)), LoadSlot(slot(B, 2)), UnloadModel(C))
