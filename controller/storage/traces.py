"""The recent spans on SQL; see the port `controller.traces.store` for what each method promises.

A trace is not stored as such: it is the spans that carry its id. With the bound on rows, grouping them when asked is
cheap, and a span that comes late simply joins.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Connection, RowMapping, Select, case, delete, func, select
from sqlalchemy.dialects.sqlite import insert

from controller.storage.database import Database
from controller.storage.tables import spans
from controller.traces.model import SpanKind, SpanLine, SpanRecord, TraceFilter, TraceSummary, span_names_about


class SqlTraceStore:
    """`database` may be one of its own: nothing refers to spans."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, records: Sequence[SpanRecord], *, max_spans: int) -> None:
        if records:
            await self._database.run(lambda connection: _add(connection, records, max_spans))

    async def recent(self, wanted: TraceFilter) -> Sequence[TraceSummary]:
        return await self._database.read(lambda connection: _recent(connection, wanted))

    async def trace(self, trace_id: str) -> Sequence[SpanRecord]:
        statement = select(spans).where(spans.c.trace_id == trace_id).order_by(spans.c.start_us, spans.c.row)
        return await self._database.read(
            lambda connection: [_record(row) for row in connection.execute(statement).mappings()]
        )

    async def summaries(self, trace_ids: Collection[str]) -> Sequence[TraceSummary]:
        return await self._database.read(
            lambda connection: _summaries(connection, _SUMMARY.where(spans.c.trace_id.in_(trace_ids)))
        )

    async def lines_after(self, row: int, *, limit: int) -> Sequence[SpanLine]:
        statement = _LINES.where(spans.c.row > row).limit(limit)
        return await self._database.read(
            lambda connection: [_line(found) for found in connection.execute(statement).mappings()]
        )


_LINES = select(
    spans.c.row,
    spans.c.trace_id,
    spans.c.service,
    spans.c.name,
    spans.c.start_us,
    spans.c.duration_us,
    spans.c.is_error,
    spans.c.attributes,
).order_by(spans.c.row)
_START_US = func.min(spans.c.start_us).label("start_us")
_SUMMARY = (
    select(
        spans.c.trace_id,
        _START_US,
        (func.max(spans.c.start_us + spans.c.duration_us) - func.min(spans.c.start_us)).label("duration_us"),
        func.count().label("span_count"),
        func.max(spans.c.is_error).label("has_error"),
    )
    .group_by(spans.c.trace_id)
    .order_by(_START_US.desc(), spans.c.trace_id)
)


def _add(connection: Connection, records: Sequence[SpanRecord], max_spans: int) -> None:
    connection.execute(insert(spans).on_conflict_do_nothing(), [_row(record) for record in records])
    # Rows are numbered without gaps: duplicates take no number, and rows leave at the low end only.
    newest = select(func.max(spans.c.row)).scalar_subquery()
    connection.execute(delete(spans).where(spans.c.row <= newest - max_spans))


def _recent(connection: Connection, wanted: TraceFilter) -> Sequence[TraceSummary]:
    statement = _SUMMARY.limit(wanted.limit)
    if wanted.service is not None:
        statement = statement.having(_any(spans.c.service == wanted.service))
    if wanted.model is not None:
        statement = statement.having(_any(spans.c.name.in_(span_names_about(wanted.model))))
    return _summaries(connection, statement)


def _summaries(connection: Connection, statement: Select[Any]) -> Sequence[TraceSummary]:
    rows = connection.execute(statement).mappings().all()
    members = _members(connection, [row["trace_id"] for row in rows])
    return [_summary(row, members[row["trace_id"]]) for row in rows]


def _any(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """True for a group in which some row meets `condition`."""
    return func.max(case((condition, 1), else_=0)) == 1


def _members(connection: Connection, trace_ids: Sequence[str]) -> dict[str, list[RowMapping]]:
    """Return what a summary needs of each span, by trace and start."""
    statement = (
        select(spans.c.trace_id, spans.c.span_id, spans.c.parent_span_id, spans.c.name, spans.c.service)
        .where(spans.c.trace_id.in_(trace_ids))
        .order_by(spans.c.start_us, spans.c.row)
    )
    members: dict[str, list[RowMapping]] = defaultdict(list)
    for row in connection.execute(statement).mappings():
        members[row["trace_id"]].append(row)
    return members


def _summary(row: RowMapping, members: Sequence[RowMapping]) -> TraceSummary:
    present = {member["span_id"] for member in members}
    roots = (member["name"] for member in members if member["parent_span_id"] not in present)
    return TraceSummary(
        trace_id=row["trace_id"],
        # Parents in a ring leave no root; then the earliest stands for all.
        root_name=next(roots, members[0]["name"]),
        start_us=row["start_us"],
        duration_us=row["duration_us"],
        services=tuple(sorted({member["service"] for member in members})),
        span_count=row["span_count"],
        has_error=bool(row["has_error"]),
    )


def _record(row: RowMapping) -> SpanRecord:
    return SpanRecord(
        trace_id=row["trace_id"],
        span_id=row["span_id"],
        parent_span_id=row["parent_span_id"],
        name=row["name"],
        kind=SpanKind(row["kind"]),
        service=row["service"],
        instance=row["instance"],
        start_us=row["start_us"],
        duration_us=row["duration_us"],
        is_error=bool(row["is_error"]),
        attributes=orjson.loads(row["attributes"]),
    )


def _line(row: RowMapping) -> SpanLine:
    attributes = orjson.loads(row["attributes"])
    site, is_escalated = attributes.get("nanofleet.site"), attributes.get("nanofleet.escalated")
    return SpanLine(
        row["row"],
        row["trace_id"],
        row["service"],
        row["name"],
        row["start_us"],
        row["duration_us"],
        bool(row["is_error"]),
        site if isinstance(site, str) else None,
        is_escalated if isinstance(is_escalated, bool) else None,
    )


def _row(record: SpanRecord) -> dict[str, Any]:
    return {
        "trace_id": record.trace_id,
        "span_id": record.span_id,
        "parent_span_id": record.parent_span_id,
        "name": record.name,
        "kind": record.kind.value,
        "service": record.service,
        "instance": record.instance,
        "start_us": record.start_us,
        "duration_us": record.duration_us,
        "is_error": int(record.is_error),
        "attributes": orjson.dumps(dict(record.attributes)).decode(),
    }
