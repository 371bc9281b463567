"""The port from the traces to a database; `controller.storage.traces` implements it."""

from collections.abc import Collection, Sequence
from typing import Protocol

from controller.traces.model import SpanLine, SpanRecord, TraceFilter, TraceSummary


class TraceStore(Protocol):
    async def add(self, spans: Sequence[SpanRecord], *, max_spans: int) -> None:
        """Keep `spans`, then drop the oldest rows beyond `max_spans`; a span that is here already stays as it is."""
        ...

    async def recent(self, wanted: TraceFilter) -> Sequence[TraceSummary]:
        """Return the traces that match, the one that started last first."""
        ...

    async def trace(self, trace_id: str) -> Sequence[SpanRecord]:
        """Return every span of one trace by start; empty when there is none."""
        ...

    async def summaries(self, trace_ids: Collection[str]) -> Sequence[TraceSummary]:
        """Return those of these traces that are here, the one that started last first."""
        ...

    async def lines_after(self, row: int, *, limit: int) -> Sequence[SpanLine]:
        """Return the next `limit` spans that were stored after row number `row`, in that order; 0 begins."""
        ...
