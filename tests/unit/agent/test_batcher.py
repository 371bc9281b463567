"""The dynamic batcher: who shares a run, who is left out, and who bears an error."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from core.clock import SystemClock
from core.errors import DeadlineExceeded, InternalError, InvalidTensor, ModelNotReady, NanofleetError, Overloaded
from core.tensors import Array
from edge_agent.runtime.batcher import NEVER, SLOW_RUNS_TO_LEAVE_LOOP, SLOW_S, Batcher, QueueBounds, Ran
from edge_agent.runtime.session import RunTime
from tests.support.virtual_time import LoopClock, in_virtual_time

SLOW = RunTime(1.0, 1.0)


class Caller:
    """A waiter that is a future."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()

    def is_waiting(self) -> bool:
        return not self.future.done()

    def settle(self, ran: Ran) -> None:
        self.future.set_result(ran)

    def fail(self, error: NanofleetError) -> None:
        self.future.set_exception(error)


class Doubler:
    """A model that doubles its input and remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[Array] = []

    def __call__(self, inputs: Sequence[Array]) -> Sequence[Array]:
        self.batches.append(inputs[0])
        return [inputs[0] * 2]


class FakeClock(SystemClock):
    def __init__(self) -> None:
        self.at_s = 100.0

    def monotonic_s(self) -> float:
        return self.at_s


def row(*values: float) -> Array:
    return np.array([values], dtype=np.float32)


def ask(
    batcher: Batcher, inputs: Array, *, deadline_s: float = NEVER, client: str = "", priority: int = 0
) -> "asyncio.Future[Ran]":
    caller = Caller()
    batcher.submit([inputs], caller, deadline_s=deadline_s, client=client, priority=priority)
    return caller.future


@pytest.mark.parametrize("run_time", [RunTime(0, 0), SLOW], ids=["in the loop", "on the thread"])
async def test_when_the_middle_of_three_callers_leaves_the_others_get_their_answers(run_time: RunTime) -> None:
    batcher = Batcher(Doubler(), name="m", clock=SystemClock(), max_batch=3, run_time=run_time)
    first, middle, last = (ask(batcher, row(number)) for number in (1, 2, 3))
    middle.cancel()
    async with asyncio.timeout(5):
        assert (await first).outputs[0] == row(2)
        assert (await last).outputs[0] == row(6)
    assert middle.cancelled()


async def test_a_caller_who_leaves_during_the_run_does_not_disturb_the_others() -> None:
    loop = asyncio.get_running_loop()
    is_running = asyncio.Event()

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        loop.call_soon_threadsafe(is_running.set)
        return inputs

    batcher = Batcher(run, name="m", clock=SystemClock(), max_batch=3, run_time=SLOW)
    first, middle, last = (ask(batcher, row(number)) for number in (1, 2, 3))
    await is_running.wait()
    middle.cancel()
    async with asyncio.timeout(5):
        assert [(await first).outputs[0], (await last).outputs[0]] == [row(1), row(3)]


async def test_what_arrives_in_one_turn_of_the_loop_shares_a_run() -> None:
    model = Doubler()
    batcher = Batcher(model, name="m", clock=SystemClock(), max_batch=8)
    answers = [ask(batcher, row(number)) for number in range(5)]
    ran = await asyncio.gather(*answers)
    assert [batch.shape for batch in model.batches] == [(5, 1)]
    assert [one.outputs[0].item() for one in ran] == [0, 2, 4, 6, 8]
    assert {one.batch_rows for one in ran} == {5}


async def test_while_a_slow_run_is_under_way_the_next_batch_gathers() -> None:
    model = Doubler()
    batcher = Batcher(model, name="m", clock=SystemClock(), max_batch=8, run_time=SLOW)
    first = ask(batcher, row(1))
    await asyncio.sleep(0)
    rest = [ask(batcher, row(number)) for number in (2, 3, 4)]
    await asyncio.gather(first, *rest)
    assert [len(batch) for batch in model.batches] == [1, 3]


async def test_a_model_without_batching_runs_one_request_at_a_time() -> None:
    model = Doubler()
    batcher = Batcher(model, name="m", clock=SystemClock(), max_batch=1)
    await asyncio.gather(*[ask(batcher, row(number)) for number in range(3)])
    assert [len(batch) for batch in model.batches] == [1, 1, 1]


async def test_a_batch_has_at_most_the_rows_that_the_model_allows() -> None:
    model = Doubler()
    batcher = Batcher(model, name="m", clock=SystemClock(), max_batch=4)
    ran = await asyncio.gather(*[ask(batcher, np.full((3, 1), n, dtype=np.float32)) for n in range(2)])
    assert [len(batch) for batch in model.batches] == [3, 3]
    assert ran[1].outputs[0].tolist() == [[2], [2], [2]]


async def test_only_requests_of_one_shape_share_a_run() -> None:
    model = Doubler()
    batcher = Batcher(model, name="m", clock=SystemClock(), max_batch=8)
    await asyncio.gather(ask(batcher, row(1)), ask(batcher, row(1, 2)), ask(batcher, row(3, 4)))
    assert [batch.shape for batch in model.batches] == [(1, 1), (2, 2)]


async def test_an_expired_request_is_not_run() -> None:
    model, clock = Doubler(), FakeClock()
    batcher = Batcher(model, name="m", clock=clock, max_batch=8)
    late = ask(batcher, row(1), deadline_s=100.5)
    in_time = ask(batcher, row(2), deadline_s=200.0)
    clock.at_s = 101.0
    assert (await in_time).outputs[0] == row(4)
    with pytest.raises(DeadlineExceeded):
        await late
    assert [batch.tolist() for batch in model.batches] == [[[2]]]


async def test_a_full_queue_refuses_the_next_request() -> None:
    batcher = Batcher(Doubler(), name="m", clock=SystemClock(), bounds=QueueBounds(max_requests=2))
    accepted = [ask(batcher, row(number)) for number in range(2)]
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        ask(batcher, row(3))
    await asyncio.gather(*accepted)
    await ask(batcher, row(3))


async def test_the_queue_is_bounded_in_bytes_too() -> None:
    batcher = Batcher(Doubler(), name="m", clock=SystemClock(), bounds=QueueBounds(max_bytes=8))
    accepted = ask(batcher, row(1))
    with pytest.raises(Overloaded):
        ask(batcher, row(1, 2))
    await accepted


async def test_an_error_reaches_only_the_request_that_causes_it() -> None:
    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        if 13 in inputs[0]:
            raise InvalidTensor("13 is out of range")
        return inputs

    batcher = Batcher(run, name="m", clock=SystemClock(), max_batch=8)
    good, bad, also_good = (ask(batcher, row(number)) for number in (1, 13, 3))
    assert [(await good).outputs[0], (await also_good).outputs[0]] == [row(1), row(3)]
    with pytest.raises(InvalidTensor):
        await bad


async def test_a_defect_in_a_run_is_an_error_of_its_batch_and_the_next_batch_runs() -> None:
    runs = []

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        runs.append(inputs)
        if len(runs) == 1:
            raise ZeroDivisionError
        return inputs

    batcher = Batcher(run, name="m", clock=SystemClock(), run_time=SLOW)
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        await ask(batcher, row(1))
    assert (await ask(batcher, row(2))).outputs[0] == row(2)


@pytest.mark.parametrize("run_time", [RunTime(0, 0), SLOW], ids=["in the loop", "on the thread"])
async def test_a_defect_in_one_caller_does_not_reach_the_rest_of_its_batch_or_the_queue(run_time: RunTime) -> None:
    class Defective(Caller):
        def settle(self, ran: Ran) -> None:
            raise ZeroDivisionError

    batcher = Batcher(Doubler(), name="m", clock=SystemClock(), max_batch=3, run_time=run_time)
    first = Defective()
    batcher.submit([row(1)], first)
    middle, last, next_batch = (ask(batcher, row(number)) for number in (2, 3, 4))
    async with asyncio.timeout(5):
        assert [(await future).outputs[0] for future in (middle, last, next_batch)] == [row(4), row(6), row(8)]
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        await first.future


async def test_a_caller_that_fails_on_its_error_too_does_not_reach_the_rest_of_its_batch() -> None:
    class Defective(Caller):
        def settle(self, ran: Ran) -> None:
            raise ZeroDivisionError

        def fail(self, error: NanofleetError) -> None:
            raise ZeroDivisionError

    batcher = Batcher(Doubler(), name="m", clock=SystemClock(), max_batch=2)
    batcher.submit([row(1)], Defective())
    async with asyncio.timeout(5):
        assert (await ask(batcher, row(2))).outputs[0] == row(4)


class Timed:
    """A model whose runs take what `takes_s` says, on a fake clock; remembers which were in the loop."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.takes_s = 0.0
        self.in_loop: list[bool] = []

    def __call__(self, inputs: Sequence[Array]) -> Sequence[Array]:
        self.in_loop.append(threading.current_thread() is threading.main_thread())
        self.clock.at_s += self.takes_s
        return inputs

    async def asked(self, batcher: Batcher, *, times: int, takes_s: float) -> None:
        self.takes_s = takes_s
        for _ in range(times):
            await ask(batcher, row(1))


async def test_a_model_that_keeps_being_slower_than_measured_leaves_the_loop_for_good() -> None:
    model = Timed()
    batcher = Batcher(model, name="m", clock=model.clock)
    await model.asked(batcher, times=SLOW_RUNS_TO_LEAVE_LOOP, takes_s=2 * SLOW_S)
    await model.asked(batcher, times=2, takes_s=0.0)
    assert model.in_loop == [True] * SLOW_RUNS_TO_LEAVE_LOOP + [False] * 2


async def test_a_run_that_is_slow_now_and_then_does_not_move_a_quick_model() -> None:
    model = Timed()
    batcher = Batcher(model, name="m", clock=model.clock)
    for _ in range(SLOW_RUNS_TO_LEAVE_LOOP):
        await model.asked(batcher, times=1, takes_s=2 * SLOW_S)
        await model.asked(batcher, times=1, takes_s=0.0)
    assert all(model.in_loop)


async def test_a_model_that_may_not_run_in_the_loop_never_does() -> None:
    model = Timed()
    await model.asked(Batcher(model, name="m", clock=model.clock, may_run_inline=False), times=1, takes_s=0.0)
    assert model.in_loop == [False]


async def test_outputs_without_a_row_per_request_are_not_divided_among_them() -> None:
    batcher = Batcher(lambda inputs: [inputs[0].sum(axis=0)], name="m", clock=SystemClock(), max_batch=8)
    ran = await asyncio.gather(ask(batcher, row(1, 2, 3)), ask(batcher, row(4, 5, 6)))
    assert [one.outputs[0].tolist() for one in ran] == [[1, 2, 3], [4, 5, 6]]


async def test_draining_waits_for_what_is_queued_and_running() -> None:
    batcher = Batcher(Doubler(), name="m", clock=SystemClock(), run_time=SLOW)
    answers = [ask(batcher, row(number)) for number in range(3)]
    async with asyncio.timeout(5):
        await batcher.drain()
    assert all(answer.done() for answer in answers)


async def test_a_closed_batcher_refuses_what_waits_and_what_comes() -> None:
    batcher = Batcher(Doubler(), name="m", clock=SystemClock())
    waiting = ask(batcher, row(1))
    batcher.close()
    with pytest.raises(ModelNotReady):
        await waiting
    with pytest.raises(ModelNotReady):
        ask(batcher, row(2))


async def test_a_batcher_without_a_run_holds_what_comes_until_it_has_one() -> None:
    batcher = Batcher(None, name="m", clock=SystemClock(), max_batch=8)
    answers = [ask(batcher, row(number)) for number in (1, 2)]
    await asyncio.sleep(0)
    assert (batcher.queued, batcher.is_idle) == (2, False)
    model = Doubler()
    batcher.run_with(model, RunTime(0.0, 0.0))
    assert [(await answer).outputs[0] for answer in answers] == [row(2), row(4)]
    assert len(model.batches) == 1
    assert batcher.is_idle


async def test_holding_waits_for_the_run_under_way_and_starts_no_other() -> None:
    may_end = threading.Event()
    runs = []

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        runs.append(inputs)
        may_end.wait(5)
        return inputs

    batcher = Batcher(run, name="m", clock=SystemClock(), run_time=SLOW)
    first, second = ask(batcher, row(1)), ask(batcher, row(2))
    await asyncio.sleep(0)
    held = asyncio.ensure_future(batcher.hold())
    await asyncio.sleep(0)
    assert not held.done()
    may_end.set()
    await held
    assert (await first).outputs[0] == row(1)
    assert (len(runs), batcher.queued) == (1, 1)
    batcher.run_with(Doubler())
    assert (await second).outputs[0] == row(4)


@in_virtual_time
async def test_deadlines_pass_while_a_batcher_is_held() -> None:
    batcher = Batcher(None, name="m", clock=LoopClock())
    started_s = asyncio.get_running_loop().time()
    late = ask(batcher, row(1), deadline_s=started_s + 2.0)
    soon = ask(batcher, row(2), deadline_s=started_s + 1.0)
    for answer, after_s in ((soon, 1.0), (late, 2.0)):
        with pytest.raises(DeadlineExceeded):
            await answer
        assert asyncio.get_running_loop().time() - started_s == pytest.approx(after_s)
    assert batcher.is_idle


@in_virtual_time
async def test_draining_a_held_batcher_ends_with_its_last_deadline() -> None:
    batcher = Batcher(Doubler(), name="m", clock=LoopClock())
    waiting = ask(batcher, row(1), deadline_s=asyncio.get_running_loop().time() + 1.0)
    await batcher.hold()
    await batcher.drain()
    with pytest.raises(DeadlineExceeded):
        await waiting


async def test_closing_a_held_batcher_ends_its_draining() -> None:
    batcher = Batcher(None, name="m", clock=SystemClock())
    waiting = ask(batcher, row(1))
    drained = asyncio.ensure_future(batcher.drain())
    await asyncio.sleep(0)
    batcher.close()
    await drained
    with pytest.raises(ModelNotReady):
        await waiting


async def test_a_request_that_is_larger_than_the_queue_is_refused_even_when_nothing_waits() -> None:
    batcher = Batcher(Doubler(), name="m", clock=SystemClock(), bounds=QueueBounds(max_bytes=3))
    with pytest.raises(Overloaded):
        ask(batcher, row(1))
