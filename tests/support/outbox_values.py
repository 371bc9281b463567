"""An outbox on a folder, with a clock that stands still, and a receiver that does as it is told."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from core.errors import NanofleetError
from edge_agent.outbox.ageing import Boot
from edge_agent.outbox.outbox import Outbox
from edge_agent.outbox.rows import Bounds, Kind, Row
from edge_agent.outbox.storage import Storage, StorageLimits
from tests.support.clocks import HeldClock

DAY_S = 86_400.0
BOUNDS = dict.fromkeys(Kind, Bounds(max_rows=1000, max_bytes=1 << 20, max_age_s=7 * DAY_S))
LIMITS = StorageLimits(BOUNDS, max_bytes=4 << 20, min_free_bytes=0)


@asynccontextmanager
async def open_outbox(
    folder: Path,
    clock: HeldClock,
    *,
    limits: StorageLimits = LIMITS,
    is_running: bool = True,
    storage_type: type[Storage] = Storage,
) -> AsyncIterator[Outbox]:
    """Yield an outbox that commits by itself, unless it is not running."""
    storage = storage_type(folder / "outbox.sqlite", limits, clock=clock, boot=Boot("boot", clock.monotonic_s))
    outbox = Outbox(storage, limits.bounds, clock=clock, sleep=lambda _: asyncio.sleep(0))
    await outbox.open()
    running = asyncio.ensure_future(outbox.run()) if is_running else None
    try:
        yield outbox
    finally:
        if running is not None:
            running.cancel()
        await outbox.close()


async def until_rows(outbox: Outbox, kind: Kind, count: int) -> None:
    """Return once so many rows are durable."""
    async with asyncio.timeout(10):
        while outbox.figures is None or outbox.figures.tallies[kind].rows != count:
            await asyncio.sleep(0)


class ToldReceiver:
    """Takes rows, unless an error or a refusal was prepared for them."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.batches: list[list[str]] = []
        # By dedupe id: refused one by one.
        self.refused: set[str] = set()
        # By dedupe id: the whole batch fails.
        self.failing: dict[str, NanofleetError] = {}
        # In the order of calls.
        self.errors: list[NanofleetError] = []

    async def send(self, rows: Sequence[Row]) -> Sequence[int]:
        names = [row.dedupe_id for row in rows]
        self.batches.append(names)
        if self.errors:
            raise self.errors.pop(0)
        for name in names:
            if name in self.failing:
                raise self.failing[name]
        self.taken += [name for name in names if name not in self.refused]
        return [place for place, name in enumerate(names) if name in self.refused]


class OpenGate:
    async def until_reachable(self) -> None:
        return
