"""The port from the traces to a database; `controller.storage.traces` implements it."""

from collections.abc import Sequence
from typing import Protocol

from controller.traces.model import SpanRecord, TraceFilter, TraceSummary


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
