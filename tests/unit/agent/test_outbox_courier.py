"""Emptying the outbox: in order, in small batches, past what nobody takes, and never faster than a fleet may."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from core.backoff import BackoffPolicy
from core.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from edge_agent.link.reachability import Gate
from edge_agent.outbox.courier import MAX_BREAKAGES, Courier, Pace
from edge_agent.outbox.outbox import Outbox
from edge_agent.outbox.rows import Kind, Loss, Row
from tests.support.clocks import HeldClock
from tests.support.outbox_values import OpenGate, ToldReceiver, open_outbox, until_rows

PACE = Pace(max_rows=4, max_bytes=1 << 16, spread_s=30.0, interval_s=1.0, retry=BackoffPolicy(2.0, 300.0))


class Fixture:
    def __init__(self, outbox: Outbox, clock: HeldClock) -> None:
        self.outbox, self.clock = outbox, clock
        self.receiver = ToldReceiver()
        self.slept: list[float] = []

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.pass_s(seconds)
        await asyncio.sleep(0)

    async def put(self, *names: str) -> None:
        for name in names:
            self.outbox.put(Kind.AUDIT, b"body", dedupe_id=name)
        await until_rows(self.outbox, Kind.AUDIT, len(names))

    @asynccontextmanager
    async def delivering(self, *, gate: Gate | OpenGate | None = None, pace: Pace = PACE) -> AsyncIterator[None]:
        courier = Courier(
            Kind.AUDIT,
            self.outbox,
            self.receiver,
            gate or OpenGate(),
            pace=pace,
            clock=self.clock,
            uniform=lambda: 0.5,
            sleep=self._sleep,
        )
        running = asyncio.ensure_future(courier.run())
        try:
            yield
        finally:
            running.cancel()

    async def until_empty(self) -> None:
        await until_rows(self.outbox, Kind.AUDIT, 0)

    @property
    def poisoned(self) -> int:
        assert self.outbox.figures is not None
        return self.outbox.figures.losses.get((Kind.AUDIT, Loss.POISON), 0)


@pytest.fixture
async def fixture(tmp_path: Path) -> AsyncIterator[Fixture]:
    clock = HeldClock()
    async with open_outbox(tmp_path, clock) as outbox:
        yield Fixture(outbox, clock)


async def test_rows_leave_in_order_in_batches_and_are_counted(fixture: Fixture) -> None:
    await fixture.put(*"abcdefghij")
    async with fixture.delivering():
        await fixture.until_empty()

    assert fixture.receiver.batches == [[*"abcd"], [*"efgh"], [*"ij"]]
    assert fixture.outbox.sent[Kind.AUDIT] == 10


async def test_nothing_leaves_before_the_receiver_can_be_reached(fixture: Fixture) -> None:
    gate = Gate(asyncio.Event())
    await fixture.put("a")
    async with fixture.delivering(gate=gate):
        for _ in range(20):
            await asyncio.sleep(0)
        assert fixture.receiver.batches == []
        gate.is_there.set()
        await fixture.until_empty()


async def test_a_row_refused_for_good_is_dropped_and_counted_and_those_behind_it_leave(fixture: Fixture) -> None:
    fixture.receiver.refused = {"b"}
    await fixture.put("a", "b", "c")
    async with fixture.delivering():
        await fixture.until_empty()

    assert (fixture.receiver.taken, fixture.poisoned) == (["a", "c"], 1)


async def test_a_batch_refused_as_a_whole_is_taken_apart_until_the_row_at_fault_is_dropped(fixture: Fixture) -> None:
    fixture.receiver.failing = {"c": InvalidRequest("not a record")}
    await fixture.put(*"abcdefgh")
    async with fixture.delivering():
        await fixture.until_empty()

    assert (fixture.receiver.taken, fixture.poisoned) == ([*"abdefgh"], 1)


async def test_a_row_that_breaks_its_receiver_again_and_again_does_not_hold_up_the_others(fixture: Fixture) -> None:
    fixture.receiver.failing = {"a": InternalError("it broke")}
    await fixture.put("a", "b")
    async with fixture.delivering():
        await fixture.until_empty()

    assert (fixture.receiver.taken, fixture.poisoned) == (["b"], 1)
    assert len(fixture.receiver.batches) >= MAX_BREAKAGES


async def test_a_receiver_that_is_away_loses_nothing_and_is_asked_ever_less_often(fixture: Fixture) -> None:
    fixture.receiver.errors = [Unavailable("away") for _ in range(12)]
    await fixture.put("a", "b")
    async with fixture.delivering():
        await fixture.until_empty()

    assert (fixture.receiver.taken, fixture.poisoned) == (["a", "b"], 0)
    assert max(fixture.slept) == 150.0  # Half of the longest delay, as `uniform` says.


async def test_a_receiver_that_says_when_is_not_asked_before(fixture: Fixture) -> None:
    fixture.receiver.errors = [Overloaded("too many").after(90.0)]
    await fixture.put("a")
    async with fixture.delivering():
        await fixture.until_empty()

    assert 90.0 * 1.5 in fixture.slept


async def test_after_an_absence_the_first_batch_waits_its_turn(fixture: Fixture) -> None:
    await fixture.put("a")
    async with fixture.delivering():
        await fixture.until_empty()

    assert fixture.slept[0] == 15.0  # Half of `spread_s`.


async def test_a_receiver_that_is_slow_has_four_fifths_of_its_time_for_others(fixture: Fixture) -> None:
    send = fixture.receiver.send

    async def slowly(rows):  # type: ignore[no-untyped-def]
        fixture.clock.pass_s(10.0)
        return await send(rows)

    fixture.receiver.send = slowly  # type: ignore[method-assign]
    await fixture.put("a")
    async with fixture.delivering():
        await fixture.until_empty()
        for _ in range(20):
            await asyncio.sleep(0)

    assert 40.0 in fixture.slept


async def test_rows_that_cannot_be_read_are_not_asked_for_without_a_pause(fixture: Fixture) -> None:
    class Unreadable:
        asked = 0

        async def until_waiting(self, kind: Kind) -> None:
            return

        async def oldest(self, kind: Kind, *, limit: int, max_bytes: int) -> list[Row]:
            self.asked += 1
            return []

        async def settle(self, kind: Kind, *, sent: list[Row], refused: list[Row]) -> None:
            raise AssertionError

    source = Unreadable()
    pace = replace(PACE, spread_s=0.0)
    courier = Courier(
        Kind.AUDIT, source, fixture.receiver, OpenGate(), pace=pace, clock=fixture.clock, sleep=fixture._sleep
    )
    running = asyncio.ensure_future(courier.run())
    for _ in range(50):
        await asyncio.sleep(0)
    running.cancel()

    assert source.asked > 2
    assert fixture.clock.monotonic_s() >= (source.asked - 1) * PACE.interval_s


async def test_what_was_sent_and_not_acknowledged_is_sent_again_after_a_restart(tmp_path: Path) -> None:
    clock = HeldClock()
    async with open_outbox(tmp_path, clock) as outbox:
        first = Fixture(outbox, clock)
        await first.put("a")
        # The receiver took it, and the answer was lost with the process.
        await first.receiver.send(await outbox.oldest(Kind.AUDIT, limit=1, max_bytes=1 << 20))
    async with open_outbox(tmp_path, clock) as outbox:
        second = Fixture(outbox, clock)
        async with second.delivering():
            await second.until_empty()

    assert (first.receiver.taken, second.receiver.taken) == (["a"], ["a"])
