"""The batcher when more comes than it can run: who is let in, who is served, who is told to come again."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DeadlineExceeded, NanofleetError, Overloaded
from core.tensors import Array
from edge_agent.runtime.batcher import NEVER, Batcher, QueueBounds, Ran, Run, Shed
from edge_agent.runtime.session import RunTime
from edge_agent.runtime.threads import RunThreads, available_cores
from tests.support.virtual_time import LoopClock, VirtualExecutor, in_virtual_time
from tests.unit.agent.test_batcher import Doubler, ask, row

TAKES_S = 0.01
MEASURED = RunTime(TAKES_S, TAKES_S)


def now_s() -> float:
    return asyncio.get_running_loop().time()


def slow_batcher(
    run: Run,
    *,
    bounds: QueueBounds | None = None,
    max_batch: int = 1,
    max_wait_s: float = 0.0,
    threads: RunThreads | None = None,
    run_time: RunTime = MEASURED,
    reply_reserve_s: float = 0.0,
) -> Batcher:
    """A model whose every run takes TAKES_S of virtual time."""
    return Batcher(
        run,
        name="m",
        clock=LoopClock(),
        max_batch=max_batch,
        max_wait_s=max_wait_s,
        run_time=run_time,
        bounds=bounds,
        threads=threads or RunThreads(1, VirtualExecutor(TAKES_S)),
        reply_reserve_s=reply_reserve_s,
    )


async def errors_of(answers: Sequence["asyncio.Future[Ran]"]) -> list[type[BaseException] | None]:
    results = await asyncio.gather(*answers, return_exceptions=True)
    return [type(result) if isinstance(result, BaseException) else None for result in results]


@in_virtual_time
async def test_who_leaves_frees_its_place_and_its_bytes_at_once() -> None:
    batcher = slow_batcher(Doubler(), bounds=QueueBounds(max_requests=2, max_bytes=8))
    running = ask(batcher, row(0))
    await asyncio.sleep(0)
    waiting = [ask(batcher, row(number)) for number in (1, 2)]
    with pytest.raises(Overloaded):
        ask(batcher, row(3))
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert batcher.queued == 1
    assert (await ask(batcher, row(3))).outputs[0] == row(6)
    await asyncio.gather(running, waiting[1])
    assert batcher.shed == {Shed.FULL: 1, Shed.LEFT: 1}


@in_virtual_time
async def test_who_leaves_is_not_run() -> None:
    model = Doubler()
    batcher = slow_batcher(model)
    answers = [ask(batcher, row(number)) for number in range(3)]
    await asyncio.sleep(0)
    answers[1].cancel()
    await batcher.drain()
    assert [batch.item() for batch in model.batches] == [0, 2]


@in_virtual_time
async def test_draining_ends_when_the_last_who_waits_leaves() -> None:
    batcher = Batcher(None, name="m", clock=LoopClock())
    waiting = ask(batcher, row(1))
    drained = asyncio.ensure_future(batcher.drain())
    await asyncio.sleep(0)
    waiting.cancel()
    async with asyncio.timeout(1):
        await drained


@in_virtual_time
async def test_a_request_that_cannot_be_answered_in_time_is_refused_at_once_and_told_when_to_come_again() -> None:
    batcher = slow_batcher(Doubler())
    ahead = [ask(batcher, row(number), priority=1) for number in range(10)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="would take 132 ms, and 50 ms are left") as refusal:
        ask(batcher, row(99), deadline_s=now_s() + 5 * TAKES_S)
    after_s = refusal.value.retry_after_s
    assert after_s is not None
    assert after_s == pytest.approx(8.25 * TAKES_S)
    await asyncio.sleep(after_s)
    await ask(batcher, row(99), deadline_s=now_s() + 5 * TAKES_S + 1e-6)
    await asyncio.gather(*ahead)


@in_virtual_time
async def test_at_three_times_what_it_can_do_nearly_all_of_its_time_goes_into_answers_that_are_in_time() -> None:
    model = Doubler()
    batcher = slow_batcher(model, reply_reserve_s=0.02)
    deadlines: list[float] = []
    answered_s: list[float] = []
    started_s = now_s()
    answers = []
    for number in range(300):
        await asyncio.sleep(TAKES_S / 3)
        deadline_s = now_s() + 0.2
        try:
            answer = ask(batcher, row(number), deadline_s=deadline_s)
        except Overloaded:
            continue
        deadlines.append(deadline_s)
        answer.add_done_callback(lambda _: answered_s.append(now_s()))
        answers.append(answer)
    elapsed_s = now_s() - started_s
    assert await errors_of(answers) == [None] * len(answers)
    assert all(at_s <= deadline_s - 0.02 + 1e-6 for at_s, deadline_s in zip(answered_s, deadlines, strict=True))
    assert len([at_s for at_s in answered_s if at_s <= started_s + elapsed_s]) >= 0.98 * elapsed_s / TAKES_S
    assert len(model.batches) == len(answers)


class RunsByHand(Executor):
    """A thread whose run ends when a test says so, in the middle of what the loop is doing."""

    def __init__(self) -> None:
        self.begun: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self.begun.append((Future(), partial(work, *args, **kwargs)))
        return self.begun[-1][0]

    def end(self) -> None:
        future, work = self.begun[-1]
        future.set_result(work())


async def test_a_thread_that_has_ended_its_run_does_not_wait_for_a_loop_that_is_busy_with_newcomers() -> None:
    executor = RunsByHand()
    batcher = slow_batcher(Doubler(), threads=RunThreads(1, executor))
    answers = [ask(batcher, row(number)) for number in range(2)]
    await asyncio.sleep(0)
    executor.end()
    assert len(executor.begun) == 1
    answers.append(ask(batcher, row(2)))
    assert len(executor.begun) == 2
    executor.end()
    await answers[1]
    executor.end()
    assert [ran.outputs[0].item() for ran in await asyncio.gather(*answers)] == [0, 2, 4]
    assert len(executor.begun) == 3


@in_virtual_time
async def test_when_the_machine_becomes_slower_what_would_be_late_is_not_run() -> None:
    executor, model = VirtualExecutor(TAKES_S), Doubler()
    batcher = slow_batcher(model, threads=RunThreads(1, executor))
    executor.takes_s = 3 * TAKES_S
    answers = [ask(batcher, row(number), deadline_s=now_s() + 12 * TAKES_S) for number in range(8)]
    outcomes = await errors_of(answers)
    assert outcomes.count(None) == len(model.batches) == 4
    assert batcher.shed[Shed.OVERTAKEN] == 4
    assert outcomes.count(Overloaded) == 4


@in_virtual_time
async def test_an_estimate_that_is_far_too_long_does_not_lock_a_model_up() -> None:
    batcher = slow_batcher(Doubler(), run_time=RunTime(10.0, 10.0))
    for _attempt in range(150):
        if await errors_of([ask(batcher, row(1), deadline_s=now_s() + 0.1)]) == [None]:
            break
    else:
        pytest.fail("nothing ever ran")
    for _ in range(20):
        await asyncio.sleep(1)
        await errors_of([ask(batcher, row(1), deadline_s=now_s() + 0.1)])
    await ask(batcher, row(1), deadline_s=now_s() + 0.03)


@in_virtual_time
async def test_one_client_that_floods_takes_no_place_from_another() -> None:
    batcher = slow_batcher(Doubler(), bounds=QueueBounds(max_requests=8))
    flood = []
    for number in range(9):
        flood.append(ask(batcher, row(number), client="flood"))
        await asyncio.sleep(0)
    light = ask(batcher, row(99), client="light")
    before_s = now_s()
    await light
    assert now_s() - before_s <= 3 * TAKES_S
    with pytest.raises(Overloaded, match="another deserves the place more"):
        await flood[-1]
    assert (await errors_of(flood[:-1])) == [None] * 8
    assert batcher.shed == {Shed.DISPLACED: 1}


@in_virtual_time
async def test_the_urgent_are_served_before_the_patient() -> None:
    batcher = slow_batcher(Doubler())
    order: list[int] = []
    for priority in (0, 90, 90, 0, 1):
        ask(batcher, row(priority), priority=priority).add_done_callback(
            lambda done: order.append(int(done.result().outputs[0].item() / 2))
        )
    await batcher.drain()
    await asyncio.sleep(0)
    assert order == [1, 0, 0, 90, 90]


@in_virtual_time
async def test_a_full_queue_makes_room_of_those_whose_deadline_has_passed() -> None:
    executor = VirtualExecutor(1.0)
    batcher = slow_batcher(
        Doubler(), bounds=QueueBounds(max_requests=1), threads=RunThreads(1, executor), run_time=RunTime(0.0004, 0.0004)
    )
    running = ask(batcher, row(0))
    await asyncio.sleep(0)
    expired = ask(batcher, row(1), deadline_s=now_s() + 0.5)
    await asyncio.sleep(0.75)
    patient = ask(batcher, row(2))
    with pytest.raises(DeadlineExceeded):
        await expired
    await asyncio.gather(running, patient)


@in_virtual_time
async def test_a_batch_takes_no_rows_that_would_make_one_of_it_late() -> None:
    model = Doubler()
    # 10 ms and 1 ms a row.
    batcher = slow_batcher(model, max_batch=10, run_time=RunTime(0.011, 0.020))
    tight = ask(batcher, row(0), deadline_s=now_s() + 0.013)
    rest = [ask(batcher, row(number)) for number in range(1, 6)]
    await asyncio.gather(tight, *rest)
    assert [len(batch) for batch in model.batches] == [3, 3]


async def used_to_a_request_each_ms(model: Doubler, *, max_batch: int = 32) -> Batcher:
    """A batcher that has nothing to do at the moment."""
    batcher = slow_batcher(model, max_batch=max_batch, max_wait_s=0.005)
    for number in range(200):
        ask(batcher, row(number))
        await asyncio.sleep(0.001)
    await batcher.drain()
    model.batches.clear()
    return batcher


@in_virtual_time
async def test_a_slow_model_waits_for_a_fuller_batch_when_requests_come_often_enough() -> None:
    model = Doubler()
    batcher = await used_to_a_request_each_ms(model)
    for number in range(10):
        ask(batcher, row(number))
        await asyncio.sleep(0.001)
    await batcher.drain()
    assert [len(batch) for batch in model.batches] == [4, 6]


@in_virtual_time
async def test_a_slow_model_does_not_wait_for_requests_that_come_seldom() -> None:
    batcher = slow_batcher(Doubler(), max_batch=32, max_wait_s=0.005)
    for number in range(20):
        asked_s = now_s()
        await ask(batcher, row(number))
        assert now_s() - asked_s == pytest.approx(TAKES_S)
        await asyncio.sleep(0.05)


@in_virtual_time
async def test_a_batch_that_waits_runs_as_soon_as_it_is_as_full_as_it_hoped() -> None:
    model = Doubler()
    batcher = await used_to_a_request_each_ms(model)
    answers = [ask(batcher, row(1))]
    await asyncio.sleep(0.0001)
    asked_s = now_s()
    answers += [ask(batcher, row(number)) for number in range(8)]
    await asyncio.gather(*answers[:4])
    assert [len(batch) for batch in model.batches] == [4]
    assert now_s() - asked_s == pytest.approx(TAKES_S)
    await batcher.drain()


@in_virtual_time
async def test_a_batch_that_waits_in_vain_runs_when_it_has_waited_as_long_as_it_meant_to() -> None:
    batcher = await used_to_a_request_each_ms(Doubler())
    asked_s = now_s()
    await ask(batcher, row(1))
    assert TAKES_S < now_s() - asked_s <= TAKES_S + 0.005


@in_virtual_time
async def test_holding_a_batcher_that_waits_for_more_rows_starts_no_run() -> None:
    model = Doubler()
    batcher = await used_to_a_request_each_ms(model)
    answer = ask(batcher, row(1))
    await asyncio.sleep(0.0001)
    await batcher.hold()
    await asyncio.sleep(1)
    assert not model.batches
    batcher.run_with(model)
    await answer


@in_virtual_time
async def test_many_models_share_few_threads_and_take_turns() -> None:
    executor = VirtualExecutor(TAKES_S)
    threads = RunThreads(2, executor)
    batchers = [slow_batcher(Doubler(), threads=threads) for _ in range(5)]
    answers = [ask(batcher, row(number)) for batcher in batchers for number in range(4)]
    started_s = now_s()
    await asyncio.gather(*answers)
    assert executor.most_running == 2
    assert now_s() - started_s == pytest.approx(10 * TAKES_S)


@in_virtual_time
async def test_a_model_that_is_held_while_it_waits_for_a_thread_leaves_its_turn_to_the_next() -> None:
    threads = RunThreads(1, VirtualExecutor(TAKES_S))
    first, held, third = (slow_batcher(Doubler(), threads=threads) for _ in range(3))
    answers = [ask(batcher, row(1)) for batcher in (first, held, third)]
    await asyncio.sleep(0)
    await held.hold()
    await asyncio.gather(answers[0], answers[2])
    assert not answers[1].done()
    held.run_with(Doubler())
    await answers[1]


@in_virtual_time
async def test_a_request_whose_deadline_passes_while_others_are_run_again_one_by_one_is_not_run() -> None:
    runs: list[int] = []

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        runs.append(len(inputs[0]))
        loop = asyncio.get_running_loop()
        getattr(loop, "pass_s")(0.04)  # noqa: B009  (of the virtual loop)
        if len(inputs[0]) > 1:
            raise Overloaded("not together")
        return inputs

    batcher = Batcher(run, name="m", clock=LoopClock(), max_batch=8)
    answers = [ask(batcher, row(1), deadline_s=now_s() + limit_s) for limit_s in (1.0, 0.05)]
    assert await errors_of(answers) == [None, DeadlineExceeded]
    assert runs == [2, 1]


class Silent:
    """A waiter whose future never tells that it left."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()
        self.failures: list[NanofleetError] = []

    def is_waiting(self) -> bool:
        return not self.failures

    def settle(self, ran: Ran) -> None:
        raise AssertionError("settled")

    def fail(self, error: NanofleetError) -> None:
        self.failures.append(error)


@in_virtual_time
async def test_a_waiter_hears_once_that_its_deadline_has_passed() -> None:
    batcher = Batcher(None, name="m", clock=LoopClock())
    waiter = Silent()
    batcher.submit([row(1)], waiter, deadline_s=now_s() + 0.5)
    await asyncio.sleep(1)
    batcher.close()
    assert [type(failure) for failure in waiter.failures] == [DeadlineExceeded]


def test_the_cores_of_an_agent_are_bounded_by_its_quota(tmp_path: Path) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/system.slice/agent.service\n")
    group = tmp_path / "sys" / "fs" / "cgroup" / "system.slice" / "agent.service"
    group.mkdir(parents=True)
    unlimited = available_cores(tmp_path)
    (group / "cpu.max").write_text("max 100000\n")
    assert available_cores(tmp_path) == unlimited
    (group.parent / "cpu.max").write_text("50000 100000\n")
    assert available_cores(tmp_path) == 1


class Recorder:
    """A model that remembers when each request, named by its only number, has run."""

    def __init__(self) -> None:
        self.ran_s: dict[int, float] = {}

    def __call__(self, inputs: Sequence[Array]) -> Sequence[Array]:
        for number in inputs[0][:, 0]:
            assert int(number) not in self.ran_s
            self.ran_s[int(number)] = now_s()
        return inputs


Arrival = tuple[float, float | None, str, int, bool]
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.001, 0.02]),
        st.sampled_from([None, 0.005, 0.03, 0.1]),
        st.sampled_from("abc"),
        st.sampled_from([0, 1, 90]),
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(arrivals=ARRIVALS, takes_s=st.sampled_from([0.002, 0.01, 0.05]), max_batch=st.sampled_from([1, 4]))
def test_whatever_comes_everybody_hears_once_and_nothing_runs_whose_deadline_has_passed(
    arrivals: list[Arrival], takes_s: float, max_batch: int
) -> None:
    @in_virtual_time
    async def scenario() -> None:
        model = Recorder()
        threads = RunThreads(1, VirtualExecutor(takes_s))
        batcher = slow_batcher(
            model, threads=threads, max_batch=max_batch, max_wait_s=0.005, bounds=QueueBounds(max_requests=6)
        )
        answers: dict[int, asyncio.Future[Ran]] = {}
        deadlines: dict[int, float] = {}
        refusals: list[Overloaded] = []
        for number, (gap_s, limit_s, client, priority, leaves) in enumerate(arrivals):
            await asyncio.sleep(gap_s)
            deadlines[number] = NEVER if limit_s is None else now_s() + limit_s
            try:
                answers[number] = ask(
                    batcher, row(number), deadline_s=deadlines[number], client=client, priority=priority
                )
            except Overloaded as error:
                refusals.append(error)
                continue
            assert batcher.queued <= 6
            if leaves:
                answers[number].cancel()
        await batcher.drain()
        await asyncio.sleep(0)
        assert all(answer.done() for answer in answers.values())
        for number, ran_s in model.ran_s.items():
            # The virtual executor computes at the end of a run.
            assert ran_s - takes_s <= deadlines[number]
        answered = [number for number, answer in answers.items() if not answer.cancelled() and not answer.exception()]
        assert set(answered) <= set(model.ran_s)
        left_before_their_run = sum(batcher.shed[reason] for reason in (Shed.DISPLACED, Shed.OVERTAKEN, Shed.EXPIRED))
        assert all(refusal.retry_after_s for refusal in refusals)
        assert len(refusals) == batcher.shed[Shed.FULL] + batcher.shed[Shed.HOPELESS]
        assert len(model.ran_s) + left_before_their_run + batcher.shed[Shed.LEFT] == len(answers)

    scenario()
