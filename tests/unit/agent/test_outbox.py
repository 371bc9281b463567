"""The loop's side of the outbox: nobody waits for the disk, a stop loses nothing, jumps of the clock are told."""

import asyncio
import threading
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from edge_agent.outbox import outbox as module
from edge_agent.outbox.outbox import Outbox
from edge_agent.outbox.rows import Bounds, Kind, Loss, NewRow
from edge_agent.outbox.storage import Incident, Storage, StorageLimits
from tests.support.clocks import HeldClock
from tests.support.outbox_values import BOUNDS, open_outbox, until_rows


async def names(outbox: Outbox, kind: Kind = Kind.AUDIT) -> list[str]:
    return [row.dedupe_id for row in await outbox.oldest(kind, limit=100, max_bytes=1 << 20)]


async def test_put_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    async with open_outbox(tmp_path, HeldClock(), is_running=False) as outbox:
        # The thread is busy, as with an fsync that takes seconds.
        release = threading.Event()
        busy = asyncio.ensure_future(outbox._hop(release.wait))
        assert all(outbox.put(Kind.AUDIT, b"body", dedupe_id=f"{number}") for number in range(100))
        release.set()
        await busy


async def test_what_was_put_before_a_stop_is_there_after_the_start(tmp_path: Path) -> None:
    async with open_outbox(tmp_path, HeldClock(), is_running=False) as outbox:
        outbox.put(Kind.AUDIT, b"body", dedupe_id="last words")

    async with open_outbox(tmp_path, HeldClock()) as outbox:
        assert await names(outbox) == ["last words"]


class CountingStorage(Storage):
    commits: ClassVar[list[int]] = []

    def add(self, rows: list[NewRow]) -> None:
        self.commits.append(len(rows))
        super().add(rows)


async def test_rows_that_come_together_are_one_commit(tmp_path: Path) -> None:
    async with open_outbox(tmp_path, HeldClock(), storage_type=CountingStorage) as outbox:
        for number in range(50):
            outbox.put(Kind.AUDIT, b"body", dedupe_id=f"{number}")
        await until_rows(outbox, Kind.AUDIT, 50)
    assert CountingStorage.commits == [50]


async def test_more_than_the_thread_can_take_is_refused_and_counted(tmp_path: Path) -> None:
    bounds = dict.fromkeys(Kind, Bounds(1000, 8 << 20, 60.0))
    limits = StorageLimits(bounds, 64 << 20, 0)
    async with open_outbox(tmp_path, HeldClock(), limits=limits, is_running=False) as outbox:
        large = bytes(module.MAX_GATHERED_BYTES // 2)
        assert outbox.put(Kind.ESCALATION, large, dedupe_id="first")
        assert not outbox.put(Kind.ESCALATION, large, dedupe_id="second")
        await outbox._commit()
        assert outbox.figures is not None
        assert outbox.figures.losses == {(Kind.ESCALATION, Loss.BACKLOG): 1}


async def test_a_row_larger_than_its_kind_may_be_is_refused(tmp_path: Path) -> None:
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        assert not outbox.put(Kind.AUDIT, bytes(BOUNDS[Kind.AUDIT].max_bytes), dedupe_id="large")


async def test_rows_from_another_thread_are_kept(tmp_path: Path) -> None:
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        await asyncio.to_thread(outbox.put_from_thread, Kind.TELEMETRY, b"spans", dedupe_id="batch")
        await until_rows(outbox, Kind.TELEMETRY, 1)


async def test_a_courier_is_woken_by_a_row_and_not_by_an_empty_queue(tmp_path: Path) -> None:
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        woken = asyncio.ensure_future(outbox.until_waiting(Kind.AUDIT))
        await asyncio.sleep(0)
        assert not woken.done()
        outbox.put(Kind.AUDIT, b"body", dedupe_id="a")
        async with asyncio.timeout(10):
            await woken


async def test_a_jump_of_the_wall_clock_is_told_and_small_corrections_are_not(tmp_path: Path) -> None:
    clock = HeldClock()
    told: list[Incident] = []
    async with open_outbox(tmp_path, clock) as outbox:
        outbox.on_incident(told.append)
        clock.pass_s(10)
        clock.set(clock.now() + timedelta(seconds=10.5))
        outbox.look_at_clock()
        assert told == []
        clock.set(clock.now() - timedelta(days=365))
        outbox.look_at_clock()
        outbox.look_at_clock()

    assert told == [Incident("clock.jumped", f"the wall clock jumped by {-365 * 86400:+.0f} s")]
