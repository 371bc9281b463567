"""What agents write down, on SQL; see the port `controller.records.store` for what each method promises."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, Table, delete, func, insert, literal, select

from controller.records.model import (
    HOUR,
    DayUsage,
    Event,
    EventFilter,
    HourUsage,
    Kept,
    KnownEvent,
    Per,
    UsageFilter,
    begin_of,
)
from controller.storage.database import Database
from controller.storage.instants import instant_of, microseconds_of
from controller.storage.tables import agent_events as events
from controller.storage.tables import agent_usage as hours
from controller.storage.upserts import save
from core.fleet_state import Usage
from core.ids import AgentId

_DAY_US = 86_400_000_000
_COUNTS = ("answered_edge", "answered_heavy", "refused", "failed")


class SqlRecordStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self, agent_id: AgentId, hours: Sequence[HourUsage], events: Sequence[Event], *, now: datetime, kept: Kept
    ) -> None:
        def added(connection: Connection) -> None:
            _add_hours(connection, agent_id, hours, now, kept)
            _add_events(connection, agent_id, events, now, kept)

        await self._database.run(added)

    async def forget(self, *, before: datetime) -> int:
        def forgotten(connection: Connection) -> int:
            limit_us = microseconds_of(before)
            removed = connection.execute(delete(events).where(events.c.received_us < limit_us)).rowcount
            return removed + connection.execute(delete(hours).where(hours.c.believed_us < limit_us)).rowcount

        return await self._database.run(forgotten)

    async def usage(self, wanted: UsageFilter) -> Sequence[DayUsage]:
        return await self._database.read(lambda connection: _usage(connection, wanted))

    async def events(self, wanted: EventFilter) -> Sequence[KnownEvent]:
        return await self._database.read(lambda connection: _events(connection, wanted))


# ---- taking in ---------------------------------------------------------------------------------------------------


def _add_hours(connection: Connection, agent_id: AgentId, told: Sequence[HourUsage], now: datetime, kept: Kept) -> None:
    if not told:
        return
    boots = {each.boot_id for each in told}
    known = {
        (row["boot_id"], row["hour_us"], row["model"]): row
        for row in connection.execute(
            select(hours).where(hours.c.agent == agent_id, hours.c.boot_id.in_(boots))
        ).mappings()
    }
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    for each in told:
        key = (each.boot_id, microseconds_of(each.hour), each.model)
        rows[key] = _greater(_hour_row(agent_id, each, now), rows.get(key) or known.get(key))
    save(connection, hours, list(rows.values()))
    _shed(connection, hours, agent_id, order=hours.c.believed_us, most=kept.max_hours)


def _hour_row(agent_id: AgentId, told: HourUsage, now: datetime) -> dict[str, Any]:
    return {
        "agent": agent_id,
        "boot_id": told.boot_id,
        "hour_us": microseconds_of(told.hour),
        "model": told.model,
        "believed_us": microseconds_of(told.believed_hour(now)),
        **{name: getattr(told.usage, name) for name in _COUNTS},
    }


def _greater(row: dict[str, Any], known: RowMapping | dict[str, Any] | None) -> dict[str, Any]:
    if known is None:
        return row
    # When the hour was is believed once: told again later, by a wrong clock, it would move.
    counts = {name: max(row[name], known[name]) for name in _COUNTS}
    return {**row, **counts, "believed_us": known["believed_us"]}


def _add_events(connection: Connection, agent_id: AgentId, told: Sequence[Event], now: datetime, kept: Kept) -> None:
    # Of two with one id in a batch the first counts.
    new = {each.dedupe_id: each for each in reversed(told)}
    if not new:
        return
    of_these = select(events.c.dedupe_id).where(events.c.agent == agent_id, events.c.dedupe_id.in_(list(new)))
    known = set(connection.scalars(of_these))
    rows = [_event_row(agent_id, each, now) for name, each in reversed(new.items()) if name not in known]
    if rows:
        connection.execute(insert(events), rows)
        _shed(connection, events, agent_id, order=events.c.id, most=kept.max_events)


def _event_row(agent_id: AgentId, event: Event, now: datetime) -> dict[str, Any]:
    return {
        "agent": agent_id,
        "dedupe_id": event.dedupe_id,
        "at_us": microseconds_of(event.told.believed(now)),
        "received_us": microseconds_of(now),
        "action": event.action,
        "target": event.target,
        "detail": event.detail,
        "count": event.count,
    }


def _shed(connection: Connection, table: Table, agent_id: AgentId, *, order: ColumnElement[int], most: int) -> None:
    """Remove the oldest rows of an agent beyond `most`; some more where several are equally old."""
    newest = select(order).where(table.c.agent == agent_id).order_by(order.desc()).offset(most).limit(1)
    limit = connection.scalar(newest)
    if limit is not None:
        connection.execute(delete(table).where(table.c.agent == agent_id, order <= limit))


# ---- giving out --------------------------------------------------------------------------------------------------


def _usage(connection: Connection, wanted: UsageFilter) -> Sequence[DayUsage]:
    day = (hours.c.believed_us // literal(_DAY_US)).label("day")
    by_agent, by_model = wanted.per in {Per.AGENT, Per.BOTH}, wanted.per in {Per.MODEL, Per.BOTH}
    named = [*([hours.c.agent] if by_agent else []), *([hours.c.model] if by_model else [])]
    sums = [func.sum(hours.c[name]).label(name) for name in _COUNTS]
    statement = (
        select(day, *named, *sums)
        .where(
            hours.c.believed_us >= microseconds_of(begin_of(wanted.since)),
            hours.c.believed_us < microseconds_of(begin_of(wanted.until) + timedelta(days=1)),
        )
        .group_by(day, *named)
        .order_by(day.desc(), *named)
        .limit(wanted.limit)
    )
    if wanted.agent is not None:
        statement = statement.where(hours.c.agent == wanted.agent)
    if wanted.model is not None:
        statement = statement.where(hours.c.model == wanted.model)
    return [_day(row) for row in connection.execute(statement).mappings()]


def _day(row: RowMapping) -> DayUsage:
    day = datetime.fromtimestamp(row["day"] * (24 * HOUR).total_seconds(), UTC).date()
    agent: str | None = row.get("agent")
    # PostgreSQL adds integers up to a decimal.
    usage = Usage(**{name: int(row[name]) for name in _COUNTS})
    return DayUsage(day, None if agent is None else AgentId(agent), row.get("model"), usage)


def _events(connection: Connection, wanted: EventFilter) -> Sequence[KnownEvent]:
    statement = select(events).where(events.c.agent == wanted.agent_id).order_by(events.c.id.desc())
    if wanted.before is not None:
        statement = statement.where(events.c.id < wanted.before)
    if wanted.action is not None:
        is_wanted = events.c.action == wanted.action
        if wanted.action.endswith("."):
            is_wanted = events.c.action.startswith(wanted.action, autoescape=True)
        statement = statement.where(is_wanted)
    return [_event(row) for row in connection.execute(statement.limit(wanted.limit)).mappings()]


def _event(row: RowMapping) -> KnownEvent:
    return KnownEvent(
        row["id"],
        AgentId(row["agent"]),
        instant_of(row["at_us"]),
        instant_of(row["received_us"]),
        row["action"],
        row["target"],
        row["detail"],
        row["count"],
    )
