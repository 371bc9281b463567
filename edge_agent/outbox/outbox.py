"""The loop's side of the outbox: `put` costs no wait; what came meanwhile is one commit on the outbox's thread.

    put ─▶ gathered (bounded) ─run─▶ thread: Storage.add ─▶ `waiting` of its kind is set, its courier takes over

A row is durable once its commit is, some milliseconds after `put`: a power cut in between loses it, which is the price
of never making a request wait for the disk. Everything here but `put_from_thread` is called in the loop.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from core.clock import Clock
from edge_agent.outbox.rows import ROW_COST_BYTES, Bounds, Kind, Loss, Losses, NewRow, Row
from edge_agent.outbox.storage import Figures, Incident, Storage

T = TypeVar("T")

# Chosen: a commit costs an fsync, and flash wears out by them; ten a second are the most.
COMMIT_INTERVAL_S = 0.1
# Chosen: what may wait for the thread; an fsync of a slow card takes a second.
MAX_GATHERED_BYTES = 4 << 20
# Chosen: how often is looked at what time asks for (age, a disk that may be back, pages to give back).
LOOK_INTERVAL_S = 30.0
# Chosen: what no synchronised clock does by itself.
CLOCK_JUMP_S = 60.0


class Outbox:
    """Keep `run` and `look_after` running; `close` writes the rest down."""

    def __init__(
        self,
        storage: Storage,
        bounds: dict[Kind, Bounds],
        *,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._storage = storage
        self._bounds = bounds
        self._clock = clock
        self._sleep = sleep
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._gathered: list[NewRow] = []
        self._gathered_bytes = 0
        # Counted here, told to the storage with the next commit.
        self._lost: Losses = {}
        self._put = asyncio.Event()
        self._waiting = {kind: asyncio.Event() for kind in Kind}
        self._offset_s = self._wall_offset_s()
        self._on_incident: Callable[[Incident], None] = lambda _: None
        self.sent: dict[Kind, int] = dict.fromkeys(Kind, 0)
        self.clock_jumps = 0
        self._figures: Figures | None = None

    async def open(self) -> None:
        await self._hop(self._storage.open)
        await self._refresh()

    async def close(self) -> None:
        await self._commit()
        await self._hop(self._storage.close)
        await asyncio.to_thread(self._thread.shutdown)

    def on_incident(self, hear: Callable[[Incident], None]) -> None:
        """Have `hear` told what an operator wants to know: trouble with the disk, jumps of the clock."""
        self._on_incident = hear

    @property
    def figures(self) -> Figures | None:
        """How the storage stood when it was last asked; None: it is not open yet."""
        return self._figures

    # ---- putting -----------------------------------------------------------------------------------------------

    def put(self, kind: Kind, body: bytes, *, dedupe_id: str) -> bool:
        """Have a row kept; False: there is no room for it, which is counted."""
        size_bytes = len(body) + len(dedupe_id) + ROW_COST_BYTES
        if size_bytes > self._bounds[kind].max_bytes:
            return self._refuse(kind, Loss.SIZE)
        if self._gathered_bytes + size_bytes > MAX_GATHERED_BYTES:
            return self._refuse(kind, Loss.BACKLOG)
        at_us = int(self._clock.now().timestamp() * 1e6)
        self._gathered.append(NewRow(kind, dedupe_id, body, self._storage.age.now_s(), at_us))
        self._gathered_bytes += size_bytes
        self._put.set()
        return True

    def put_from_thread(self, kind: Kind, body: bytes, *, dedupe_id: str) -> None:
        """The same from any thread; a loop that has ended takes nothing, and there is nobody left to be told."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(lambda: self.put(kind, body, dedupe_id=dedupe_id))

    def _refuse(self, kind: Kind, why: Loss) -> bool:
        self._lost[kind, why] = self._lost.get((kind, why), 0) + 1
        return False

    # ---- loops -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit what is gathered: at once after a quiet time, else every COMMIT_INTERVAL_S."""
        while True:
            await self._put.wait()
            await self._commit()
            await self._sleep(COMMIT_INTERVAL_S)

    async def look_after(self) -> None:
        while True:
            await self._sleep(LOOK_INTERVAL_S)
            self.look_at_clock()
            await self._hop(self._storage.look_after)
            await self._refresh()

    def look_at_clock(self) -> None:
        """Tell of it when the wall clock went another way than the monotonic one."""
        offset_s = self._wall_offset_s()
        jump_s, self._offset_s = offset_s - self._offset_s, offset_s
        if abs(jump_s) >= CLOCK_JUMP_S:
            self.clock_jumps += 1
            self._on_incident(Incident("clock.jumped", f"the wall clock jumped by {jump_s:+.0f} s"))

    def _wall_offset_s(self) -> float:
        return self._clock.now().timestamp() - self._clock.monotonic_s()

    async def _commit(self) -> None:
        self._put.clear()
        rows, self._gathered, self._gathered_bytes = self._gathered, [], 0
        lost, self._lost = self._lost, {}
        if rows or lost:
            await self._hop(lambda: self._take(rows, lost))
            await self._refresh()

    def _take(self, rows: list[NewRow], lost: Losses) -> None:
        for (kind, why), count in lost.items():
            self._storage.lose(kind, why, count)
        if rows:
            self._storage.add(rows)

    # ---- for couriers ------------------------------------------------------------------------------------------

    async def until_waiting(self, kind: Kind) -> None:
        """Return once there is a row of `kind`."""
        await self._waiting[kind].wait()

    async def oldest(self, kind: Kind, *, limit: int, max_bytes: int) -> list[Row]:
        rows = await self._hop(lambda: self._storage.oldest(kind, limit=limit, max_bytes=max_bytes))
        if not rows:
            await self._refresh()
        return rows

    async def settle(self, kind: Kind, *, sent: list[Row], refused: list[Row]) -> None:
        """Forget rows that were taken, and those that never will be, which are counted as lost."""

        def settled() -> None:
            self._storage.lose(kind, Loss.POISON, len(refused))
            self._storage.remove([row.number for row in (*sent, *refused)])

        await self._hop(settled)
        self.sent[kind] += len(sent)
        await self._refresh()

    def age_s(self, row: Row) -> float:
        return max(0.0, self._storage.age.now_s() - row.born_s)

    async def _refresh(self) -> None:
        figures, incidents = await self._hop(lambda: (self._storage.figures(), self._storage.taken_incidents()))
        self._figures = figures
        for kind, tally in figures.tallies.items():
            (self._waiting[kind].set if tally.rows else self._waiting[kind].clear)()
        for incident in incidents:
            self._on_incident(incident)

    async def _hop(self, act: Callable[[], T]) -> T:
        """Do it on the outbox's thread. Cancelling the caller neither undoes it nor keeps it from being done."""
        return await asyncio.shield(self._loop.run_in_executor(self._thread, act))
