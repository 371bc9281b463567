"""Fair sending: bytes are shared evenly, nobody starves, and one alone waits for nothing."""

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.transfer.fairness import Admission, FairQueue, FairSender, SendLimits, Ticket
from core.clock import SystemClock
from core.errors import Overloaded
from core.ids import AgentId
from tests.support.clocks import HeldClock

MIB = 1 << 20
# Room for one chunk at a time, so that every choice shows.
ONE_AT_A_TIME = SendLimits(in_flight_bytes=1)
A, B = AgentId("a"), AgentId("b")


async def nothing() -> None:
    pass


def names(tickets: list[Ticket]) -> list[AgentId]:
    return [ticket.agent_id for ticket in tickets]


@given(
    sizes=st.lists(st.lists(st.integers(1, MIB), min_size=1, max_size=12), min_size=2, max_size=6),
    in_flight_bytes=st.sampled_from([1, MIB, 3 * MIB]),
)
def test_agents_that_always_wait_share_bytes_within_a_chunk_and_none_starves(
    sizes: list[list[int]], in_flight_bytes: int
) -> None:
    queue = FairQueue(SendLimits(in_flight_bytes=in_flight_bytes))
    left = {AgentId(f"agent-{number}"): list(chunks) for number, chunks in enumerate(sizes)}
    sent = dict.fromkeys(left, 0)
    for agent, chunks in left.items():
        queue.ask(agent, chunks[0])
    under_way = queue.admit(0.0)
    while under_way:
        ticket = under_way.pop(0)
        agent = ticket.agent_id
        sent[agent] += ticket.size_bytes
        left[agent].pop(0)
        if left[agent]:
            queue.ask(agent, left[agent][0])
        queue.finish(ticket)
        under_way += queue.admit(0.0)
        busy = [sent[other] for other, chunks in left.items() if chunks]
        # Those under way are not in `sent` yet.
        assert not busy or max(busy) - min(busy) <= 2 * MIB + in_flight_bytes
    assert sent == {AgentId(f"agent-{number}"): sum(chunks) for number, chunks in enumerate(sizes)}


@given(st.lists(st.sampled_from([1, 1000, MIB]), min_size=20, max_size=60))
def test_one_chunk_at_a_time_keeps_two_agents_within_a_chunk(sizes: list[int]) -> None:
    queue = FairQueue(ONE_AT_A_TIME)
    sent = {A: 0, B: 0}
    chunks = iter(sizes)
    queue.ask(A, next(chunks))
    queue.ask(B, next(chunks))
    for size_bytes in chunks:
        (ticket,) = queue.admit(0.0)
        sent[ticket.agent_id] += ticket.size_bytes
        queue.ask(ticket.agent_id, size_bytes)
        queue.finish(ticket)
        assert abs(sent[A] - sent[B]) <= MIB


def test_an_agent_that_was_idle_earns_no_credit() -> None:
    queue = FairQueue(ONE_AT_A_TIME)
    for _ in range(10):
        queue.ask(A, MIB)
        (ticket,) = queue.admit(0.0)
        queue.finish(ticket)
    order = []
    queue.ask(A, MIB)
    queue.ask(B, MIB)
    while tickets := queue.admit(0.0):
        order += names(tickets)
        queue.finish(tickets[0])
        if len(order) < 6:
            queue.ask(tickets[0].agent_id, MIB)
    assert order[:4].count(B) == 2


def test_an_agent_may_have_so_many_bytes_under_way_and_no_more() -> None:
    queue = FairQueue(SendLimits(agent_in_flight_bytes=2 * MIB))
    for _ in range(3):
        queue.ask(A, MIB)
    queue.ask(B, MIB)
    assert names(queue.admit(0.0)) == [A, B, A]


def test_a_stuck_receiver_gives_its_room_back_but_not_its_own_bound() -> None:
    queue = FairQueue(SendLimits(in_flight_bytes=MIB, agent_in_flight_bytes=MIB))
    queue.ask(A, MIB)
    (stuck,) = queue.admit(0.0)
    queue.ask(A, MIB)
    queue.ask(B, MIB)
    assert queue.admit(0.0) == []
    queue.stall(stuck)
    assert names(queue.admit(0.0)) == [B]


def test_a_slow_agent_has_no_share_until_it_takes_a_chunk_in_time() -> None:
    queue = FairQueue(SendLimits(in_flight_bytes=MIB))
    queue.ask(A, MIB)
    (late,) = queue.admit(0.0)
    queue.stall(late)
    queue.finish(late)
    queue.ask(A, MIB)
    (in_time,) = queue.admit(0.0)
    queue.ask(B, MIB)
    (other,) = queue.admit(0.0)
    queue.finish(other)
    queue.finish(in_time)
    queue.ask(A, MIB)
    queue.ask(B, MIB)
    assert len(queue.admit(0.0)) == 1


def test_what_is_withdrawn_is_never_admitted() -> None:
    queue = FairQueue(SendLimits())
    ticket = queue.ask(A, MIB)
    queue.withdraw(ticket)
    assert queue.admit(0.0) == []


def test_the_bandwidth_is_kept() -> None:
    queue = FairQueue(SendLimits(bytes_per_s=MIB))
    for _ in range(3):
        queue.ask(A, MIB)
    assert len(queue.admit(10.0)) == 1
    assert queue.admit(10.9) == []
    assert queue.free_at_s() == 11.0
    assert len(queue.admit(11.0)) == 1


async def test_one_alone_waits_for_nothing() -> None:
    sender = FairSender(SendLimits(), clock=SystemClock())
    for _ in range(100):
        async with asyncio.timeout(1), sender.turn(A, MIB, on_wait=nothing):
            pass


async def test_a_turn_that_is_given_up_lets_the_next_pass() -> None:
    sender = FairSender(ONE_AT_A_TIME, clock=SystemClock())

    async def wait() -> None:
        async with sender.turn(B, MIB, on_wait=nothing):
            pass

    async with sender.turn(A, MIB, on_wait=nothing):
        given_up, next_one = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
    async with asyncio.timeout(1):
        await next_one


async def test_a_turn_that_is_given_up_in_the_moment_it_comes_is_given_back() -> None:
    sender = FairSender(ONE_AT_A_TIME, clock=SystemClock())

    async def wait() -> None:
        async with sender.turn(B, MIB, on_wait=nothing):
            await asyncio.Event().wait()

    async with sender.turn(A, MIB, on_wait=nothing):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    async with asyncio.timeout(1), sender.turn(A, MIB, on_wait=nothing):
        pass


async def test_who_waits_for_its_turn_is_called_meanwhile() -> None:
    sender = FairSender(SendLimits(in_flight_bytes=1, word_s=0.001), clock=SystemClock())
    words = asyncio.Semaphore(0)

    async def word() -> None:
        words.release()

    async def wait() -> None:
        async with sender.turn(B, MIB, on_wait=word):
            pass

    async with asyncio.timeout(5), sender.turn(A, MIB, on_wait=nothing):
        waiting = asyncio.create_task(wait())
        for _ in range(3):
            await words.acquire()
    async with asyncio.timeout(5):
        await waiting


async def test_a_turn_that_comes_while_its_receiver_takes_no_word_stops_nobody() -> None:
    sender = FairSender(SendLimits(in_flight_bytes=1, word_s=0.001, patience_s=0.01), clock=SystemClock())
    is_stuck = asyncio.Event()

    async def stick() -> None:
        is_stuck.set()
        await asyncio.Event().wait()

    async def wait() -> None:
        async with sender.turn(B, MIB, on_wait=stick):
            pass

    async with asyncio.timeout(5), sender.turn(A, MIB, on_wait=nothing):
        stuck = asyncio.create_task(wait())
        await is_stuck.wait()
    async with asyncio.timeout(5), sender.turn(A, MIB, on_wait=nothing):
        pass
    stuck.cancel()
    await asyncio.wait([stuck])


async def test_stuck_receivers_stop_nobody() -> None:
    sender = FairSender(SendLimits(in_flight_bytes=MIB, patience_s=0.01), clock=SystemClock())
    async with sender.turn(A, MIB, on_wait=nothing), asyncio.timeout(1), sender.turn(B, MIB, on_wait=nothing):
        pass


async def test_the_bandwidth_lets_the_next_chunk_through_in_time() -> None:
    sender = FairSender(SendLimits(bytes_per_s=1000), clock=SystemClock())
    started_s = asyncio.get_running_loop().time()
    for _ in range(3):
        async with sender.turn(A, 20, on_wait=nothing):
            pass
    assert asyncio.get_running_loop().time() - started_s >= 0.039


def test_transfers_beyond_the_bound_are_told_when_to_come_back() -> None:
    clock = HeldClock()
    admission = Admission(max_transfers=1, pause_s=10, clock=clock, uniform=lambda: 0.5)
    with admission.transfer(A) as first, admission.transfer(B) as second:
        assert (first, second) == (True, False)
        assert (admission.later() - clock.now()).total_seconds() == 10
    with admission.transfer(B) as third:
        assert third


@pytest.mark.parametrize(("bytes_per_s", "at_once"), [(1000, 1), (MIB // 4, 2), (100 * MIB, 3)])
def test_no_more_transfers_run_than_the_bandwidth_gives_a_chunk_in_time(bytes_per_s: int, at_once: int) -> None:
    admission = Admission(max_transfers=3, bytes_per_s=bytes_per_s, clock=HeldClock())
    with ExitStack() as stack:
        running = [stack.enter_context(admission.transfer(AgentId(f"agent-{number}"))) for number in range(4)]
    assert running.count(True) == at_once


def test_one_agent_has_so_many_transfers_and_no_more() -> None:
    admission = Admission(max_per_agent=1, clock=HeldClock())
    with admission.transfer(A), pytest.raises(Overloaded, match="at most 1 transfers"), admission.transfer(A):
        pass


def test_of_the_many_agents_that_stall_and_never_come_back_the_first_are_forgotten() -> None:
    queue = FairQueue(SendLimits(in_flight_bytes=1))

    def is_known_as_slow(agent: AgentId) -> bool:
        """Say whether a chunk of this agent holds nobody up."""
        queue.ask(agent, 1)
        (of_agent,) = queue.admit(0.0)
        queue.ask(B, 1)
        others = queue.admit(0.0)
        for ticket in (of_agent, *(others or ())):
            queue.finish(ticket)
        for ticket in () if others else queue.admit(0.0):
            queue.finish(ticket)
        return bool(others)

    agents = [AgentId(f"lost-{number}") for number in range(1025)]
    for agent in agents:
        queue.ask(agent, 1)
        (late,) = queue.admit(0.0)
        queue.stall(late)
        queue.finish(late)
    assert (is_known_as_slow(agents[0]), is_known_as_slow(agents[1024])) == (False, True)
