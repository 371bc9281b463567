"""`Traces`: takes spans in, keeps the recent ones, answers questions about them.

Taking in never waits: spans go to a bounded queue and from there to the store in batches. What does not fit the queue
is refused, which the exporter is told, and counted.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice

from controller.traces.model import SpanLine, SpanRecord, TraceFilter, TraceSummary
from controller.traces.store import TraceStore
from core.errors import NotFound

_log = logging.getLogger(__name__)

# Chosen: some seconds of a busy fleet; at about 2 KB a span, 40 MB at worst.
MAX_QUEUED_SPANS = 20_000
# One transaction; larger ones gain little and hold the writer longer.
MAX_BATCH_SPANS = 2_000


class Traces:
    """Keep `run` running in a task of the owner: it stores what was taken in."""

    def __init__(self, store: TraceStore, *, max_spans: int, max_queued_spans: int = MAX_QUEUED_SPANS) -> None:
        self._store = store
        self._max_spans = max_spans
        self._max_queued_spans = max_queued_spans
        self._queue: deque[SpanRecord] = deque()
        self._has_work = asyncio.Event()
        self.taken_count = self.refused_count = 0
        # Grows with every batch that is stored, for those who look again only when there is something new to see.
        self.revision = 0

    def take_in(self, spans: Sequence[SpanRecord]) -> int:
        """Queue `spans` for the store; return how many at the end of them had no room."""
        room = max(0, self._max_queued_spans - len(self._queue))
        self._queue.extend(spans[:room])
        self._has_work.set()
        refused = max(0, len(spans) - room)
        self.taken_count += len(spans) - refused
        self._count_refused(refused)
        return refused

    async def run(self) -> None:
        """Store what was taken in, batch by batch; for ever."""
        while True:
            await self._has_work.wait()
            await self.flush()

    async def flush(self) -> None:
        """Store all that is queued; what cannot be stored stays queued."""
        while self._queue:
            batch = list(islice(self._queue, MAX_BATCH_SPANS))
            await self._store.add(batch, max_spans=self._max_spans)
            for _ in batch:
                self._queue.popleft()
            self.revision += 1
        self._has_work.clear()

    async def recent(self, wanted: TraceFilter) -> Sequence[TraceSummary]:
        """Return the traces that match, the one that started last first."""
        return await self._store.recent(wanted)

    async def trace(self, trace_id: str) -> Sequence[SpanRecord]:
        """Return every span of one trace, by start.

        Raises:
            NotFound: it is not here, or not any more.
        """
        spans = await self._store.trace(trace_id)
        if not spans:
            raise NotFound(f"trace {trace_id[:80]!r}: not among the recent spans; see `nanofleet traces`")
        return spans

    async def summaries(self, trace_ids: Collection[str]) -> Sequence[TraceSummary]:
        """Return those of these traces that are here still, the one that started last first."""
        return await self._store.summaries(trace_ids)

    async def lines_after(self, row: int, *, limit: int) -> Sequence[SpanLine]:
        """Return the next `limit` spans that were stored after row number `row`, in that order; 0 begins."""
        return await self._store.lines_after(row, limit=limit)

    def _count_refused(self, refused: int) -> None:
        if not refused:
            return
        _log.log(
            logging.DEBUG if self.refused_count else logging.WARNING,
            "spans come faster than they can be stored; some are refused",
            extra={"refused": refused},
        )
        self.refused_count += refused
