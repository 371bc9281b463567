"""The trace store in memory, and spans made up for tests."""

from collections.abc import Collection, Mapping, Sequence
from itertools import count

from controller.traces.model import (
    AttributeValue,
    SpanKind,
    SpanLine,
    SpanRecord,
    TraceFilter,
    TraceSummary,
    span_names_about,
)

_numbers = count(1)


class MemoryTraceStore:
    """`fail_next` breaks one write."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, str], SpanRecord] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self.fail_next: Exception | None = None

    async def add(self, spans: Sequence[SpanRecord], *, max_spans: int) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        for span in spans:
            key = span.trace_id, span.span_id
            self._spans.setdefault(key, span)
            self._rows.setdefault(key, len(self._rows) + 1)
        for oldest in list(self._spans)[: max(0, len(self._spans) - max_spans)]:
            del self._spans[oldest]

    async def recent(self, wanted: TraceFilter) -> Sequence[TraceSummary]:
        summaries = [_summary(await self.trace(trace_id)) for trace_id in {span.trace_id for span in self._all()}]
        names = None if wanted.model is None else span_names_about(wanted.model)
        matching = [
            summary
            for summary in summaries
            if (wanted.service is None or wanted.service in summary.services)
            and (names is None or any(span.name in names for span in await self.trace(summary.trace_id)))
        ]
        return sorted(matching, key=lambda summary: (-summary.start_us, summary.trace_id))[: wanted.limit]

    async def trace(self, trace_id: str) -> Sequence[SpanRecord]:
        return sorted((span for span in self._all() if span.trace_id == trace_id), key=lambda span: span.start_us)

    async def summaries(self, trace_ids: Collection[str]) -> Sequence[TraceSummary]:
        found = [_summary(spans) for spans in [await self.trace(trace_id) for trace_id in trace_ids] if spans]
        return sorted(found, key=lambda summary: (-summary.start_us, summary.trace_id))

    async def lines_after(self, row: int, *, limit: int) -> Sequence[SpanLine]:
        later = [(self._rows[key], span) for key, span in self._spans.items() if self._rows[key] > row]
        return [_line(number, span) for number, span in later[:limit]]

    def _all(self) -> Sequence[SpanRecord]:
        return list(self._spans.values())


def _summary(spans: Sequence[SpanRecord]) -> TraceSummary:
    present = {span.span_id for span in spans}
    start_us = spans[0].start_us
    return TraceSummary(
        trace_id=spans[0].trace_id,
        root_name=next((span.name for span in spans if span.parent_span_id not in present), spans[0].name),
        start_us=start_us,
        duration_us=max(span.start_us + span.duration_us for span in spans) - start_us,
        services=tuple(sorted({span.service for span in spans})),
        span_count=len(spans),
        has_error=any(span.is_error for span in spans),
    )


def _line(row: int, span: SpanRecord) -> SpanLine:
    site, is_escalated = span.attributes.get("nanofleet.site"), span.attributes.get("nanofleet.escalated")
    return SpanLine(
        row,
        span.trace_id,
        span.service,
        span.name,
        span.start_us,
        span.duration_us,
        span.is_error,
        site if isinstance(site, str) else None,
        is_escalated if isinstance(is_escalated, bool) else None,
    )


def made_span(
    trace: int,
    name: str = "compute",
    *,
    parent: SpanRecord | None = None,
    service: str = "nanofleet-agent",
    start_us: int = 1_000_000,
    duration_us: int = 100,
    is_error: bool = False,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> SpanRecord:
    """Return a span of trace number `trace`, with an id of its own."""
    return SpanRecord(
        trace_id=f"{trace:032x}",
        span_id=f"{next(_numbers):016x}",
        parent_span_id=None if parent is None else parent.span_id,
        name=name,
        kind=SpanKind.INTERNAL,
        service=service,
        instance="agent-1",
        start_us=start_us,
        duration_us=duration_us,
        is_error=is_error,
        attributes=attributes or {},
    )
