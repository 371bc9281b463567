"""Bringing models into memory and out of it: on demand, one at a time, within the budget, never under a run."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import Forbidden, IntegrityError, ModelNotReady, NanofleetError, TooLarge
from edge_agent.runtime.berth import Phase
from edge_agent.runtime.footprint import Footprint
from tests.support.berths import Memory
from tests.support.virtual_time import VirtualLoop, in_virtual_time

MIB = 1 << 20


def now_s() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_a_request_to_a_cold_model_is_held_while_it_is_loaded_and_then_answered() -> None:
    memory = Memory(100)
    cat, began_s = memory.host("cat", 40, load_s=0.5), now_s()
    await memory.ask(cat)
    assert now_s() - began_s == pytest.approx(0.5)
    assert (cat.phase, memory.loader.counts.cold_requests) == (Phase.RESIDENT, 1)


@in_virtual_time
async def test_many_requests_to_a_cold_model_load_it_once() -> None:
    memory = Memory(100)
    cat = memory.host("cat", 40)
    await asyncio.gather(*[memory.ask(cat) for _ in range(20)])
    assert memory.opening(cat).loads == 1


@in_virtual_time
async def test_a_model_in_memory_answers_while_another_is_loaded() -> None:
    memory = Memory(100)
    warm, cold = memory.host("warm", 40, load_s=0.1), memory.host("cold", 40, load_s=60.0)
    await memory.ask(warm)
    held, began_s = memory.ask(cold), now_s()
    for _ in range(50):
        await memory.ask(warm)
    assert now_s() == began_s
    await held


@in_virtual_time
async def test_room_is_made_before_a_load_for_its_peak() -> None:
    memory = Memory(100)
    first, second = memory.host("first", 40), memory.host("second", 30, peak_bytes=70)
    await memory.ask(first)
    await memory.ask(second)
    assert memory.resident() == {"second"}
    assert memory.most_taken_bytes == 70


@in_virtual_time
async def test_what_is_asked_often_stays() -> None:
    memory = Memory(100)
    often, once, new = (memory.host(name, 40) for name in ("often", "once", "new"))
    await memory.ask(once)
    for _ in range(5):
        await memory.ask(often)
    await memory.ask(new)
    assert memory.resident() == {"often", "new"}


@in_virtual_time
async def test_a_request_that_cannot_wait_for_the_load_is_refused_at_once_and_told_when_to_come() -> None:
    memory = Memory(100)
    cat, began_s = memory.host("cat", 40, load_s=0.5), now_s()
    with pytest.raises(ModelNotReady, match=r"loading it takes 0\.500 s") as refusal:
        memory.ask(cat, within_s=0.2)
    assert refusal.value.retry_after_s == pytest.approx(0.5)
    assert now_s() == began_s
    await asyncio.sleep(0.6)
    await memory.ask(cat, within_s=0.2)
    assert memory.loader.counts.refused_requests == 1


@in_virtual_time
async def test_who_comes_behind_others_is_told_the_time_that_theirs_take_too() -> None:
    memory = Memory(100)
    first, second = memory.host("first", 40, load_s=1.0), memory.host("second", 40, load_s=1.0)
    held = memory.ask(first)
    await asyncio.sleep(0.4)
    with pytest.raises(ModelNotReady) as refusal:
        memory.ask(second, within_s=1.5)
    assert refusal.value.retry_after_s == pytest.approx(1.6)
    await held


@in_virtual_time
async def test_a_model_is_not_evicted_while_it_runs() -> None:
    memory = Memory(100)
    slow, other = memory.host("slow", 60, run_s=5.0), memory.host("other", 60)
    await memory.ask(slow)
    running, began_s = memory.ask(slow), now_s()
    await asyncio.gather(running, memory.ask(other))
    assert now_s() - began_s >= 5.0 + memory.opening(other).takes_s
    assert memory.resident() == {"other"}


@in_virtual_time
async def test_what_comes_while_a_model_drains_is_answered_by_its_next_load() -> None:
    memory = Memory(100)
    slow, other = memory.host("slow", 60, run_s=1.0), memory.host("other", 60)
    await memory.ask(slow)
    before, asked = memory.ask(slow), memory.ask(other)
    await asyncio.sleep(0.5)
    assert slow.phase is Phase.LEAVING
    behind = memory.ask(slow)
    await asyncio.gather(before, asked, behind)
    assert memory.opening(slow).loads == 2


@in_virtual_time
async def test_a_pinned_model_stays_and_who_has_no_room_beside_it_is_refused_with_the_remedy() -> None:
    memory = Memory(100)
    pinned, large = memory.host("pinned", 60, is_pinned=True), memory.host("large", 60)
    await memory.ask(pinned)
    with pytest.raises(ModelNotReady, match="raise \\[residency\\] budget_bytes"):
        await memory.ask(large)
    assert memory.resident() == {"pinned"}


@in_virtual_time
async def test_a_budget_smaller_than_one_model_is_said_when_it_is_brought_in() -> None:
    memory = Memory(100)
    with pytest.raises(TooLarge, match="expected at most 100 bytes of memory while it loads, it needs 101"):
        await memory.loader.bring_in(memory.host("large", 50, peak_bytes=101))


@in_virtual_time
async def test_two_that_do_not_fit_together_take_turns_no_faster_than_the_protection_allows() -> None:
    memory = Memory(100, protect_s=2.0)
    pair, began_s = [memory.host(name, 60, load_s=0.1) for name in ("one", "two")], now_s()
    answered = {berth.name: 0 for berth in pair}
    while now_s() - began_s < 60.0:
        for berth in pair:
            await memory.ask(berth)
            answered[berth.name] += 1
    assert memory.loader.counts.loads <= 60 / 2.0 + 2
    assert min(answered.values()) >= 60 / 2.2 / 2


@in_virtual_time
async def test_a_load_that_fails_is_told_to_who_waits_and_tried_again_after_a_while() -> None:
    memory = Memory(100)
    cat, dog = memory.host("cat", 40), memory.host("dog", 40)
    memory.opening(cat).failure = IntegrityError("model.onnx: the file is damaged")
    with pytest.raises(ModelNotReady, match="the file is damaged") as first:
        await memory.ask(cat)
    assert first.value.retry_after_s is not None
    await memory.ask(dog)
    assert memory.loader.taken_bytes == 40
    memory.opening(cat).failure = None
    await asyncio.sleep(first.value.retry_after_s + 0.001)
    await memory.ask(cat)
    assert (memory.loader.counts.failed_loads, cat.problem) == (1, "")


@in_virtual_time
async def test_while_a_failed_model_rests_its_requests_are_refused_without_another_load() -> None:
    memory = Memory(100)
    cat = memory.host("cat", 40)
    memory.opening(cat).failure = OSError(5, "Input/output error")
    with pytest.raises(ModelNotReady):
        await memory.ask(cat)
    cat.retry_at_s = now_s() + 5
    with pytest.raises(ModelNotReady, match="disk: Input/output error") as refusal:
        memory.ask(cat)
    assert refusal.value.retry_after_s == pytest.approx(5)
    assert not cat.residency().would_answer
    assert cat.residency().index_entry().reason == "could not be loaded: disk: Input/output error"


@in_virtual_time
async def test_a_machine_that_has_no_memory_left_loads_nothing_and_says_so() -> None:
    left_bytes = 10
    memory = Memory(100, max_wait_s=3.0, available_bytes=lambda: left_bytes)
    cat = memory.host("cat", 40)
    with pytest.raises(ModelNotReady, match="30 bytes of memory are missing on this machine"):
        await memory.ask(cat)
    left_bytes = 50
    await asyncio.sleep(60)
    await memory.ask(cat)


@in_virtual_time
async def test_a_model_that_was_loaded_by_hand_stays_until_it_is_unloaded() -> None:
    memory = Memory(100)
    kept, other = memory.host("kept", 60), memory.host("other", 60)
    await memory.loader.keep(kept)
    with pytest.raises(ModelNotReady, match="pinned models"):
        await memory.ask(other)
    await memory.loader.park(kept)
    await asyncio.sleep(60)
    await memory.ask(other)
    assert memory.resident() == {"other"}


@in_virtual_time
async def test_a_model_that_was_unloaded_by_hand_answers_nothing_until_it_is_loaded() -> None:
    memory = Memory(100)
    cat = memory.host("cat", 40, run_s=1.0)
    await memory.ask(cat)
    running = memory.ask(cat)
    await memory.loader.park(cat)
    assert running.done()
    assert (cat.phase, memory.loader.taken_bytes) == (Phase.COLD, 0)
    with pytest.raises(ModelNotReady, match="unloaded by hand"):
        memory.ask(cat)
    assert not cat.residency().would_answer
    await memory.loader.keep(cat)
    await memory.ask(cat)


@in_virtual_time
async def test_a_pinned_model_cannot_be_unloaded_by_hand() -> None:
    memory = Memory(100)
    with pytest.raises(Forbidden, match="pinned"):
        await memory.loader.park(memory.host("cat", 40, is_pinned=True))


@in_virtual_time
async def test_a_successor_is_loaded_beside_the_old_variant_when_both_fit() -> None:
    memory = Memory(100)
    old, new = memory.host("cat", 40), memory.host("cat", 40, version=2)
    await memory.ask(old)
    loading = asyncio.ensure_future(memory.loader.bring_in(new, replaces=old))
    await asyncio.sleep(0.1)
    await memory.ask(old)
    await loading
    await memory.loader.retire(old, drain_timeout_s=1.0)
    assert (new.phase, memory.loader.taken_bytes) == (Phase.RESIDENT, 40)


@in_virtual_time
async def test_where_both_do_not_fit_the_old_variant_leaves_first_and_its_requests_are_told_when_to_come(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = Memory(100)
    old, new = memory.host("cat", 60), memory.host("cat", 60, version=2)
    await memory.ask(old)
    loading = asyncio.ensure_future(memory.loader.bring_in(new, replaces=old))
    await asyncio.sleep(0.1)
    with pytest.raises(ModelNotReady, match="is being replaced") as refusal:
        memory.ask(old)
    assert refusal.value.retry_after_s == pytest.approx(0.5)
    await loading
    assert "the old one leaves first" in caplog.text


@in_virtual_time
async def test_an_old_variant_comes_back_when_the_one_that_it_left_for_does_not_load() -> None:
    memory = Memory(100)
    old, new = memory.host("cat", 60), memory.host("cat", 60, version=2)
    await memory.ask(old)
    memory.opening(new).failure = IntegrityError("damaged")
    with pytest.raises(IntegrityError):
        await memory.loader.bring_in(new, replaces=old)
    memory.loader.discard(new)
    await memory.ask(old)
    assert memory.resident() == {"cat"}


@in_virtual_time
async def test_what_a_load_really_took_corrects_the_figure_and_not_without_bound() -> None:
    memory = Memory(10 * MIB)
    cat = memory.host("cat", 4 * MIB, peak_bytes=8 * MIB)
    memory.opening(cat).footprint = Footprint(5 * MIB, 5 * MIB, 0.5)
    await memory.ask(cat)
    assert memory.loader.taken_bytes == 5 * MIB
    memory.opening(cat).footprint = Footprint(50 * MIB, 50 * MIB, 0.5)
    for _ in range(3):
        await memory.loader.park(cat)
        await memory.loader.keep(cat)
    assert memory.loader.taken_bytes < 6 * MIB


@in_virtual_time
async def test_requests_whose_deadline_passes_while_they_are_held_are_not_kept_waiting() -> None:
    memory = Memory(100)
    slow, cat = memory.host("slow", 60, run_s=9.0), memory.host("cat", 60, load_s=0.1)
    await memory.ask(slow)
    running, began_s = memory.ask(slow), now_s()
    with pytest.raises(NanofleetError, match="deadline"):
        await memory.ask(cat, within_s=1.0)
    assert now_s() - began_s == pytest.approx(1.0)
    await running


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(5, 60), st.integers(0, 40), st.sampled_from([0.0, 0.3, 2.0])), min_size=1, max_size=6
    ),
    st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3), st.booleans()), max_size=40),
    st.sampled_from([0.0, 1.0]),
)
def test_whatever_is_asked_the_budget_holds_nothing_is_evicted_in_flight_and_everybody_is_answered(
    models: list[tuple[int, int, float]], requests: list[tuple[int, float, bool]], protect_s: float
) -> None:
    """`Memory` checks the rest: no double load, nothing pinned evicted, no run after a close, never over the budget."""

    async def main() -> None:
        memory = Memory(100, protect_s=protect_s, max_wait_s=1e6)
        berths = [
            memory.host(f"m{number}", size, peak_bytes=size + more, run_s=run_s, is_pinned=number == 0 and size < 20)
            for number, (size, more, run_s) in enumerate(models)
            if size + more <= 80
        ]
        answers = []
        for number, pause_s, is_burst in requests:
            if not berths:
                break
            berth = berths[number % len(berths)]
            answers += [memory.ask(berth) for _ in range(4 if is_burst else 1)]
            await asyncio.sleep(pause_s)
        async with asyncio.timeout(3600):
            await asyncio.gather(*answers)
        assert memory.most_taken_bytes <= 100

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
