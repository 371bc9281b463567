"""Who is next in the queue of one model, and who gives way when it is full."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import NanofleetError
from edge_agent.runtime.job import NEVER, Job, Ran
from edge_agent.runtime.queue import MAX_IN_A_ROW, FairQueue, QueueBounds


class Nobody:
    """A waiter that the queue has no business with."""

    @property
    def future(self) -> "asyncio.Future[Any]":
        raise AssertionError("the queue asked who waits")

    def is_waiting(self) -> bool:
        raise AssertionError("the queue asked who waits")

    def settle(self, ran: Ran) -> None:
        raise AssertionError("the queue answered")

    def fail(self, error: NanofleetError) -> None:
        raise AssertionError("the queue answered")


def job(client: str = "a", *, rows: int = 1, deadline_s: float = NEVER, priority: int = 0, size_bytes: int = 1) -> Job:
    return Job([], Nobody(), rows=rows, client=client, deadline_s=deadline_s, priority=priority, size_bytes=size_bytes)


def filled(*jobs: Job, bounds: QueueBounds | None = None) -> FairQueue:
    queue = FairQueue(bounds or QueueBounds())
    for each in jobs:
        assert queue.make_room_for(each) == []
        queue.add(each)
    return queue


def drained(queue: FairQueue) -> Sequence[Job]:
    return [queue.pop() for _ in range(len(queue))]


def clients(jobs: Sequence[Job]) -> str:
    return "".join(each.client for each in jobs)


def test_of_one_client_the_soonest_deadline_goes_first_and_arrival_decides_between_equals() -> None:
    late, soon, also_soon = job(deadline_s=9), job(deadline_s=1), job(deadline_s=1)
    assert drained(filled(late, soon, also_soon)) == [soon, also_soon, late]


def test_clients_take_turns_however_much_one_of_them_sends() -> None:
    queue = filled(*[job("a") for _ in range(6)], *[job("b") for _ in range(2)])
    assert clients(drained(queue)) == "ababaaaa"


def test_a_turn_is_paid_in_rows() -> None:
    queue = filled(*[job("a", rows=4) for _ in range(2)], *[job("b", rows=1) for _ in range(8)])
    assert clients(drained(queue)) == "abbbbabbbb"


def test_a_client_that_comes_back_at_once_does_not_overtake() -> None:
    queue = filled(job("greedy", rows=8), *[job("x") for _ in range(4)])
    order = []
    for _ in range(4):
        taken = queue.pop()
        order.append(taken.client)
        if taken.client == "greedy":
            queue.add(job("greedy", rows=8))
    assert order == ["greedy", "x", "x", "x"]


def test_an_urgent_request_goes_before_those_who_say_nothing_and_a_patient_one_behind() -> None:
    patient, silent, urgent = job(priority=99), job(priority=0), job(priority=1)
    assert drained(filled(patient, silent, urgent)) == [urgent, silent, patient]


def test_every_level_behind_the_first_has_its_turn_while_the_first_is_never_empty() -> None:
    waiting = [job(priority=priority) for priority in (60, 70, 80)]
    queue = filled(*waiting, *[job(priority=1) for _ in range(8 * MAX_IN_A_ROW)])
    first = [queue.pop() for _ in range(3 * (MAX_IN_A_ROW + 1))]
    assert [each for each in first if each in waiting] == waiting
    assert first.index(waiting[0]) == MAX_IN_A_ROW


def test_with_many_levels_the_first_still_has_most_of_the_runs() -> None:
    queue = filled(*[job(priority=1 + number % 100) for number in range(100)], *[job(priority=1) for _ in range(100)])
    urgent = sum(queue.pop().priority == 1 for _ in range(2 * (MAX_IN_A_ROW + 1)))
    assert urgent == 2 * MAX_IN_A_ROW


def test_when_it_is_full_the_client_with_the_most_gives_way_to_one_with_less() -> None:
    flood = [job("flood", deadline_s=deadline_s) for deadline_s in (1, 2, 3)]
    queue = filled(*flood, bounds=QueueBounds(max_requests=3))
    assert queue.make_room_for(job("light")) == [flood[2]]
    assert not flood[2].is_queued


def test_a_client_that_would_then_have_as_much_is_refused_and_nobody_goes() -> None:
    queue = filled(job("a"), job("a"), job("b"), bounds=QueueBounds(max_requests=3))
    assert queue.make_room_for(job("b")) is None
    assert queue.make_room_for(job("a")) is None
    assert len(queue) == 3


def test_a_patient_request_gives_way_to_a_more_urgent_one_of_anybody() -> None:
    patient = job("b", priority=90)
    queue = filled(job("a"), patient, bounds=QueueBounds(max_requests=2))
    assert queue.make_room_for(job("a", priority=80)) == [patient]


def test_nobody_gives_way_to_a_more_patient_request() -> None:
    queue = filled(job("flood"), job("flood"), bounds=QueueBounds(max_requests=2))
    assert queue.make_room_for(job("light", priority=90)) is None


def test_bytes_count_like_places() -> None:
    large = job("flood", size_bytes=60)
    queue = filled(job("flood", size_bytes=30), large, bounds=QueueBounds(max_bytes=100))
    assert queue.make_room_for(job("light", size_bytes=40)) == [large]
    assert queue.size_bytes == 30


def test_one_that_is_larger_than_the_queue_displaces_nobody() -> None:
    queue = filled(job("a"), job("a"), bounds=QueueBounds(max_bytes=10))
    assert queue.make_room_for(job("b", size_bytes=11, priority=1)) is None
    assert len(queue) == 2


def test_who_cannot_be_let_in_after_all_costs_nobody_their_place() -> None:
    queue = filled(job("a", size_bytes=50), job("a", size_bytes=50), bounds=QueueBounds(max_bytes=100))
    before = list(queue)
    assert queue.make_room_for(job("b", size_bytes=80)) is None
    assert sorted(each.number for each in queue) == sorted(each.number for each in before)
    assert (queue.size_bytes, queue.rows) == (100, 2)


def test_those_whose_deadline_has_passed_are_taken_out() -> None:
    passed = [job("a", deadline_s=1), job("b", deadline_s=2)]
    queue = filled(*passed, job("a", deadline_s=3))
    assert queue.soonest_deadline_s() == 1
    assert sorted(queue.expired(2.0), key=lambda each: each.deadline_s) == passed
    assert (len(queue), queue.soonest_deadline_s()) == (1, 3)


@pytest.mark.parametrize(
    ("newcomer", "ahead"),
    [
        (job("flood"), 10),
        (job("flood", deadline_s=0.5), 0),
        (job("new"), 1),
        (job("new", rows=4), 4),
        (job("new", priority=1), 0),
        (job("new", priority=99), 10),
    ],
    ids=["behind its own", "before its own", "another client", "rows", "urgent", "patient"],
)
def test_what_is_ahead_of_a_newcomer_is_known(newcomer: Job, ahead: int) -> None:
    assert filled(*[job("flood", deadline_s=1.0) for _ in range(10)]).rows_ahead_of(newcomer) == ahead


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8)), max_size=60))
def test_while_two_clients_wait_neither_gets_ahead_by_more_than_two_requests(asked: list[tuple[str, int]]) -> None:
    queue = filled(*[job(client, rows=rows) for client, rows in asked])
    left = Counter(client for client, _ in asked)
    served: Counter[str] = Counter()
    while queue:
        taken = queue.pop()
        served[taken.client] += taken.rows
        left[taken.client] -= 1
        waiting = [client for client in "abc" if left[client] > 0]
        # SFQ, theorem 1: the difference is at most one largest request of each of the two.
        assert all(abs(served[one] - served[other]) <= 16 for one in waiting for other in waiting)


class QueueMachine(RuleBasedStateMachine):
    """Whatever happens, what went in comes out once, and no bound is passed."""

    BOUNDS = QueueBounds(max_requests=6, max_bytes=40)

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(self.BOUNDS)
        self.inside: set[Job] = set()

    @rule(
        client=st.sampled_from("abcd"),
        rows=st.integers(1, 4),
        size_bytes=st.integers(0, 45),
        deadline_s=st.sampled_from([1.0, 2.0, 3.0, NEVER]),
        priority=st.sampled_from([0, 1, 50, 60, 100]),
    )
    def arrive(self, client: str, rows: int, size_bytes: int, deadline_s: float, priority: int) -> None:
        newcomer = job(client, rows=rows, size_bytes=size_bytes, deadline_s=deadline_s, priority=priority)
        victims = self.queue.make_room_for(newcomer)
        if victims is None:
            return
        assert self.inside.issuperset(victims)
        self.inside.difference_update(victims)
        self.queue.add(newcomer)
        self.inside.add(newcomer)

    @precondition(lambda self: self.inside)
    @rule()
    def take(self) -> None:
        expected = self.queue.first()
        taken = self.queue.pop()
        assert taken is expected
        self.inside.remove(taken)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(sorted(self.inside, key=lambda each: each.number)))
        self.queue.remove(one)
        self.inside.remove(one)

    @rule(now_s=st.sampled_from([0.5, 1.0, 2.5]))
    def expire(self, now_s: float) -> None:
        passed = set(self.queue.expired(now_s))
        assert passed == {each for each in self.inside if each.deadline_s <= now_s}
        self.inside -= passed

    @invariant()
    def nothing_is_lost_and_no_bound_passed(self) -> None:
        assert set(self.queue) == self.inside
        assert all(each.is_queued for each in self.inside)
        assert len(self.queue) == len(self.inside) <= self.BOUNDS.max_requests
        assert self.queue.rows == sum(each.rows for each in self.inside)
        assert self.queue.size_bytes == sum(each.size_bytes for each in self.inside) <= self.BOUNDS.max_bytes
        assert self.queue.soonest_deadline_s() == min((each.deadline_s for each in self.inside), default=NEVER)


TestQueueMachine = QueueMachine.TestCase
