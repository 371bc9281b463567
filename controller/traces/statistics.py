"""`Statistics`: questions over all recent spans, answered from columns that follow the store.

    store ──lines_after──▶ SpanColumns ◀──question── whoever asks

Taking new lines in and answering happen on a thread of its own, one at a time.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

from controller.traces.columns import SpanColumns
from controller.traces.model import SpanLine

T = TypeVar("T")

# Chosen: a pull of so many lines takes some 50 ms, during which nothing else is asked of the columns.
LINES_PER_PULL = 5_000
# Chosen: whoever asks then has at most some seconds of spans to wait for.
FOLLOW_INTERVAL_S = 2.0


class Lines(Protocol):
    """Where spans are stored; `controller.traces.service.Traces` is the real one."""

    @property
    def revision(self) -> int:
        """A number that grows with every batch that is stored."""
        ...

    async def lines_after(self, row: int, *, limit: int) -> Sequence[SpanLine]: ...


class Statistics:
    """Keep `run` running in a task of the owner, and `close` it afterwards."""

    def __init__(self, lines: Lines, *, max_rows: int) -> None:
        self._lines = lines
        self._columns = SpanColumns(max_rows=max_rows)
        # Held while lines are taken in or a question is answered.
        self._busy = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trace-statistics")
        self._seen: int | None = None

    async def run(self) -> None:
        """Follow the store, for ever."""
        while True:
            async with self._busy:
                await self._follow()
            await asyncio.sleep(FOLLOW_INTERVAL_S)

    async def ask(self, question: Callable[[SpanColumns], T]) -> T:
        """Return what `question` makes of the spans that are stored now; it runs on a thread."""
        async with self._busy:
            await self._follow()
            return await self._on_thread(lambda: question(self._columns))

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    async def _follow(self) -> None:
        # Read before the lines: what is stored in between is seen again, not missed.
        revision = self._lines.revision
        if revision == self._seen:
            return
        while lines := await self._lines.lines_after(self._columns.last_row, limit=LINES_PER_PULL):
            await self._on_thread(partial(self._columns.add, lines))
        self._seen = revision

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
