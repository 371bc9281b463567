"""Fair sending: whose chunk may go next, when many agents fetch at once.

    FairQueue   decides: a queue over all chunks that wait to be sent; pure, time comes in as an argument
    FairSender  waits: `async with sender.turn(agent, size_bytes)` around every write
    Admission   how many transfers run at once; who is refused is told when to come back

The queue is start-time fair queueing (Goyal, Vin and Cheng 1996, section 2): each chunk is stamped with the virtual
time at which its agent's former chunk ended, or the present one if the agent had nothing waiting; the smallest stamp
goes first. Agents that always have something waiting get the same bytes within one chunk, however large their chunks
are, and one that was idle earns no credit for it.

Two things are scarce and so worth queueing for: the bytes under way, which bound memory, and the bandwidth that an
operator allows. A receiver that does not take its chunk within `patience_s` gives its share of the first back: what
waits for it then costs the others nothing, and until it takes one in time, its chunks have no share at all: neither
stuck agents nor many on slow links hold the others up.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from heapq import heapify, heappop, heappush
from random import random

from core.clock import Clock
from core.errors import Overloaded
from core.ids import AgentId
from core.manifest import MAX_CHUNK_BYTES

# Chosen: many times the transfers that run at once; an agent forgotten has to stall once more to be known.
_MAX_SLOW = 1024
# Chosen: within which everyone who is served gets a chunk, when the bandwidth is bounded.
_ROUND_S = 10.0


@dataclass(frozen=True, slots=True)
class SendLimits:
    """What sending to all agents together may take."""

    # Measured (benchmarks.fetch): with 16 MiB the fastest of 50 agents is 2.5 times as fast as the slowest, not 1.5.
    in_flight_bytes: int = 4 << 20
    # delivery.md, "Session and transfer".
    agent_in_flight_bytes: int = 4 << 20
    # None: as fast as the agents take it.
    bytes_per_s: int | None = None
    # Chosen: a link on which 1 MiB takes longer is the bottleneck itself, not this machine.
    patience_s: float = 0.5
    # Chosen: how often a receiver hears that its chunk waits, well within the silence that it bears.
    word_s: float = 5.0


@dataclass(order=True, slots=True)
class Ticket:
    """A chunk that waits to be sent, or is being sent."""

    start: int
    number: int
    agent_id: AgentId = field(compare=False)
    size_bytes: int = field(compare=False)


class FairQueue:
    """Decides in which order chunks are sent. Every ticket is asked for, admitted and then finished, or withdrawn."""

    def __init__(self, limits: SendLimits) -> None:
        self._limits = limits
        self._waiting: list[Ticket] = []
        self._now = 0
        self._ends: dict[AgentId, int] = {}
        # Tickets per agent, waiting or under way; an agent without any is forgotten.
        self._tickets: dict[AgentId, int] = {}
        self._agent_bytes: dict[AgentId, int] = {}
        self._bytes_under_way = 0
        self._released: set[int] = set()
        # Admitted chunks that stalled, and agents whose last chunk did, the latest last; some never come back.
        self._late: set[int] = set()
        self._slow: dict[AgentId, None] = {}
        self._count = 0
        # When the bandwidth allows the next byte.
        self._free_at_s = -math.inf

    def ask(self, agent_id: AgentId, size_bytes: int) -> Ticket:
        start = max(self._now, self._ends.get(agent_id, 0))
        self._ends[agent_id] = start + size_bytes
        self._tickets[agent_id] = self._tickets.get(agent_id, 0) + 1
        self._count += 1
        ticket = Ticket(start, self._count, agent_id, size_bytes)
        heappush(self._waiting, ticket)
        return ticket

    def admit(self, now_s: float) -> list[Ticket]:
        """Return the chunks that may be sent now, in order."""
        admitted: list[Ticket] = []
        held_back: list[Ticket] = []
        while self._waiting and self._has_room(self._waiting[0].size_bytes) and now_s >= self._free_at_s:
            ticket = heappop(self._waiting)
            if self._is_at_its_bound(ticket):
                held_back.append(ticket)
                continue
            self._start(ticket, now_s)
            admitted.append(ticket)
        for ticket in held_back:
            heappush(self._waiting, ticket)
        return admitted

    def free_at_s(self) -> float | None:
        """Return when the bandwidth allows another chunk; None when nothing waits for that."""
        return self._free_at_s if self._waiting and self._limits.bytes_per_s is not None else None

    def stall(self, ticket: Ticket) -> None:
        """Give the share of an admitted chunk back, whose receiver is slow; the agent's own bound still counts it."""
        self._late.add(ticket.number)
        self._slow.pop(ticket.agent_id, None)
        self._slow[ticket.agent_id] = None
        if len(self._slow) > _MAX_SLOW:
            del self._slow[next(iter(self._slow))]
        self._release(ticket)

    def finish(self, ticket: Ticket) -> None:
        """Take an admitted chunk back that was sent, or failed to be."""
        if ticket.number not in self._late:
            self._slow.pop(ticket.agent_id, None)
        self._late.discard(ticket.number)
        self._release(ticket)
        self._released.discard(ticket.number)
        self._agent_bytes[ticket.agent_id] -= ticket.size_bytes
        self._forget(ticket.agent_id)

    def withdraw(self, ticket: Ticket) -> None:
        """Take a chunk back that still waits."""
        self._waiting.remove(ticket)
        heapify(self._waiting)
        self._forget(ticket.agent_id)

    def _release(self, ticket: Ticket) -> None:
        if ticket.number not in self._released:
            self._released.add(ticket.number)
            self._bytes_under_way -= ticket.size_bytes

    def _has_room(self, size_bytes: int) -> bool:
        # One chunk always goes, whatever its size: a bound below it must not stop everything.
        return not self._bytes_under_way or self._bytes_under_way + size_bytes <= self._limits.in_flight_bytes

    def _is_at_its_bound(self, ticket: Ticket) -> bool:
        held_bytes = self._agent_bytes.get(ticket.agent_id, 0)
        return held_bytes > 0 and held_bytes + ticket.size_bytes > self._limits.agent_in_flight_bytes

    def _start(self, ticket: Ticket, now_s: float) -> None:
        self._now = max(self._now, ticket.start)
        self._bytes_under_way += ticket.size_bytes
        self._agent_bytes[ticket.agent_id] = self._agent_bytes.get(ticket.agent_id, 0) + ticket.size_bytes
        if ticket.agent_id in self._slow:
            self._release(ticket)
        if self._limits.bytes_per_s is not None:
            self._free_at_s = max(self._free_at_s, now_s) + ticket.size_bytes / self._limits.bytes_per_s

    def _forget(self, agent_id: AgentId) -> None:
        self._tickets[agent_id] -= 1
        if not self._tickets[agent_id]:
            del self._tickets[agent_id]
            self._agent_bytes.pop(agent_id, None)
            # Its stamp matters only while it is ahead of everybody else.
            self._ends = {other: end for other, end in self._ends.items() if end > self._now or other in self._tickets}


class FairSender:
    """Lets chunks through in the order of a FairQueue; alone, a chunk passes without waiting."""

    def __init__(self, limits: SendLimits, *, clock: Clock) -> None:
        self._limits = limits
        self._queue = FairQueue(limits)
        self._clock = clock
        # Each is told when it comes, with the timer of its patience.
        self._turns: dict[int, asyncio.Future[asyncio.TimerHandle]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def turn(
        self, agent_id: AgentId, size_bytes: int, *, on_wait: Callable[[], Awaitable[None]]
    ) -> AsyncIterator[None]:
        """Wait for the turn of a chunk, calling `on_wait` every `word_s` meanwhile; send it inside."""
        ticket = self._queue.ask(agent_id, size_bytes)
        turn = self._turns[ticket.number] = asyncio.get_running_loop().create_future()
        self._advance()
        try:
            while not turn.done():
                await asyncio.wait([turn], timeout=self._limits.word_s)
                if not turn.done():
                    await on_wait()
            yield
        finally:
            self._end(ticket, turn)

    def _end(self, ticket: Ticket, turn: "asyncio.Future[asyncio.TimerHandle]") -> None:
        if turn.done():
            turn.result().cancel()
            self._queue.finish(ticket)
        else:
            del self._turns[ticket.number]
            self._queue.withdraw(ticket)
        self._advance()

    def _stall(self, ticket: Ticket) -> None:
        self._queue.stall(ticket)
        self._advance()

    def _advance(self) -> None:
        now_s = self._clock.monotonic_s()
        for ticket in self._queue.admit(now_s):
            # It may be some time until its owner takes note: `on_wait` waits for the receiver too.
            patience = asyncio.get_running_loop().call_later(self._limits.patience_s, self._stall, ticket)
            self._turns.pop(ticket.number).set_result(patience)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        free_at_s = self._queue.free_at_s()
        if free_at_s is not None and free_at_s > now_s:
            self._timer = asyncio.get_running_loop().call_later(free_at_s - now_s, self._advance)


class Admission:
    """How many transfers run at once; the others are told when to come back, spread so that they do not return as one.

    Chosen: 64 transfers of at most 2 MiB each under way bound memory; an agent may have two, so that a new one does not
    wait until the death of an old one is noticed. A bandwidth for all together allows only so many that each gets a
    chunk in about 10 s: to come back later costs less than to wait in a stream.
    """

    def __init__(
        self,
        *,
        max_transfers: int = 64,
        max_per_agent: int = 2,
        pause_s: float = 5.0,
        bytes_per_s: int | None = None,
        clock: Clock,
        uniform: Callable[[], float] = random,
    ) -> None:
        affordable = max_transfers if bytes_per_s is None else int(bytes_per_s * _ROUND_S) // MAX_CHUNK_BYTES
        self._max_transfers = max(min(max_transfers, affordable), 1)
        self._max_per_agent = max_per_agent
        self._pause_s = pause_s
        self._clock = clock
        self._uniform = uniform
        self._active: dict[AgentId, int] = {}
        self._refused_at_s = -math.inf

    @property
    def active(self) -> int:
        return sum(self._active.values())

    @property
    def is_crowded(self) -> bool:
        """Say whether somebody was told to come back lately, so that whoever ends makes room."""
        return self._clock.monotonic_s() - self._refused_at_s < 2 * self._pause_s

    def later(self) -> datetime:
        """Return when to come back: after half to one and a half of the pause."""
        return self._clock.now() + timedelta(seconds=self._pause_s * (0.5 + self._uniform()))

    @contextmanager
    def transfer(self, agent_id: AgentId) -> Iterator[bool]:
        """Give whether a transfer of this agent may run inside.

        Raises:
            Overloaded: this agent has as many as one may have.
        """
        mine = self._active.get(agent_id, 0)
        if mine >= self._max_per_agent:
            raise Overloaded(
                f"agent {agent_id}: expected at most {self._max_per_agent} transfers at once; wait for one to end"
            )
        if self.active >= self._max_transfers:
            self._refused_at_s = self._clock.monotonic_s()
            yield False
            return
        self._active[agent_id] = mine + 1
        try:
            yield True
        finally:
            self._active[agent_id] -= 1
            if not self._active[agent_id]:
                del self._active[agent_id]
