"""Empties the outbox of one kind: in order, in small batches, at a pace that no controller drowns in.

    until reachable ─▶ until rows ─▶ send a batch ─taken, or refused for good─▶ settle, pause, next
         ▲                                └─later─▶ back off with jitter ─┘

2,000 agents that come back at the same time are spread over `spread_s`, and a receiver that answers slowly is asked at
most a fifth of the time. A batch that is refused as a whole is taken apart, until the row at fault is known and
dropped; a row that breaks its receiver again and again is dropped as well: those behind it wait.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import random
from typing import Protocol

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.errors import ErrorCode, InternalError, NanofleetError
from edge_agent.outbox.rows import Kind, Row

# What is wrong with the rows themselves, now and tomorrow.
FOR_GOOD = frozenset({ErrorCode.INVALID_REQUEST, ErrorCode.TOO_LARGE, ErrorCode.NOT_FOUND, ErrorCode.CONFLICT})
# Chosen: with the back-off, a row that breaks its receiver holds up the others for less than an hour.
MAX_BREAKAGES = 8
# Chosen: a receiver has four fifths of its time for others.
_REST_PER_WORK = 4.0

_log = logging.getLogger(__name__)


class Receiver(Protocol):
    async def send(self, rows: Sequence[Row]) -> Sequence[int]:
        """Deliver rows; return the places of those that it will never take.

        Raises:
            NanofleetError: none was taken for sure. One of FOR_GOOD: the request as a whole has no meaning.
                InternalError: the receiver broke over it. Any other: later.
        """
        ...


class Source(Protocol):
    """What is used of `outbox.Outbox`."""

    async def until_waiting(self, kind: Kind) -> None: ...

    async def oldest(self, kind: Kind, *, limit: int, max_bytes: int) -> list[Row]: ...

    async def settle(self, kind: Kind, *, sent: list[Row], refused: list[Row]) -> None: ...


class Gate(Protocol):
    """Whether the receiver can be reached; `link.reachability.Reachability` knows."""

    async def until_reachable(self) -> None: ...


_RETRY = BackoffPolicy(base_s=2.0, cap_s=300.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """`spread_s`: over which the first batch after an absence falls; `interval_s`: least time between two batches."""

    max_rows: int
    max_bytes: int
    spread_s: float = 30.0
    interval_s: float = 1.0
    retry: BackoffPolicy = _RETRY


class Courier:
    def __init__(
        self,
        kind: Kind,
        source: Source,
        receiver: Receiver,
        gate: Gate,
        *,
        pace: Pace,
        clock: Clock,
        uniform: Callable[[], float] = random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._kind = kind
        self._source = source
        self._receiver = receiver
        self._gate = gate
        self._pace = pace
        self._clock = clock
        self._uniform = uniform
        self._sleep = sleep
        self._backoff = Backoff(pace.retry, uniform=uniform)
        # Of the batch at hand: 1 while a batch is taken apart.
        self._limit = pace.max_rows
        # The row at the head that broke its receiver, and how often.
        self._broken: tuple[int, int] = (0, 0)
        self._is_failing = False

    async def run(self) -> None:
        while True:
            await self._source.until_waiting(self._kind)
            await self._gate.until_reachable()
            await self._sleep(self._pace.spread_s * self._uniform())
            while await self._deliver():
                pass
            # Also when there were rows that could not be read.
            await self._sleep(self._pace.interval_s)

    async def _deliver(self) -> bool:
        """Send one batch and wait as long as it asks for; say whether to go on at once."""
        rows = await self._source.oldest(self._kind, limit=self._limit, max_bytes=self._pace.max_bytes)
        if not rows:
            return False
        began_s = self._clock.monotonic_s()
        try:
            refused = frozenset(await self._receiver.send(rows))
        except NanofleetError as error:
            return await self._failed(rows, error)
        await self._settle(
            [row for place, row in enumerate(rows) if place not in refused],
            [row for place, row in enumerate(rows) if place in refused],
        )
        await self._rest(self._clock.monotonic_s() - began_s)
        return True

    async def _rest(self, worked_s: float) -> None:
        pause_s = max(self._pace.interval_s, _REST_PER_WORK * worked_s)
        await self._sleep(pause_s * (0.5 + self._uniform()))

    async def _failed(self, rows: list[Row], error: NanofleetError) -> bool:
        if error.code in FOR_GOOD:
            if len(rows) > 1:
                self._limit = 1
                return True
            await self._drop(rows[0], error)
            return True
        if isinstance(error, InternalError) and self._breaks(rows[0]):
            if len(rows) > 1:
                self._limit = 1
            else:
                await self._drop(rows[0], error)
            return True
        self._note(error)
        wait_s = self._backoff.next_delay_s()
        if error.retry_after_s is not None:
            # Everybody was told the same.
            wait_s = max(wait_s, error.retry_after_s * (1 + self._uniform()))
        await self._sleep(wait_s)
        return False

    def _breaks(self, head: Row) -> bool:
        """Count that the receiver broke over this row; say whether that was once too often."""
        number, times = self._broken
        self._broken = (head.number, times + 1 if number == head.number else 1)
        return self._broken[1] >= MAX_BREAKAGES

    async def _drop(self, row: Row, error: NanofleetError) -> None:
        _log.warning(
            "a row of the outbox is refused for good and dropped", extra={"kind": self._kind.value, "why": str(error)}
        )
        await self._settle([], [row])

    async def _settle(self, sent: list[Row], refused: list[Row]) -> None:
        await self._source.settle(self._kind, sent=sent, refused=refused)
        self._backoff.reset()
        # Batches grow again once the row at fault is behind.
        self._limit = min(self._pace.max_rows, 2 * self._limit)
        if self._is_failing:
            self._is_failing = False
            _log.info("the outbox is delivered again", extra={"kind": self._kind.value})

    def _note(self, error: NanofleetError) -> None:
        level = logging.DEBUG if self._is_failing else logging.WARNING
        self._is_failing = True
        _log.log(level, "the outbox cannot be delivered", extra={"kind": self._kind.value, "reason": str(error)})
