"""The record of who changed what, on SQL; see the port `controller.audit.store` for what each method promises."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Select, delete, func, insert, select, update

from controller.audit.model import Act, Actor, Entry, Filter, OpenAct, Outcome, Result
from controller.audit.store import AuditReader, AuditRecords
from controller.storage.database import Database
from controller.storage.instants import instant_of, microseconds_of
from controller.storage.tables import audit_entries as entries
from controller.storage.tables import audit_open as opened

T = TypeVar("T")


class SqlAuditStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self, use_case: Callable[[AuditRecords], T]) -> T:
        return await self._database.run(lambda connection: use_case(_SqlAuditRecords(connection)))

    async def read(self, query: Callable[[AuditReader], T]) -> T:
        return await self._database.read(lambda connection: query(_SqlAuditRecords(connection)))


class _SqlAuditRecords:
    """One transaction's view."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def newest(self) -> Entry | None:
        statement = select(entries).order_by(entries.c.id.desc()).limit(1)
        row = self._connection.execute(statement).mappings().one_or_none()
        return None if row is None else _entry(row)

    def found(self, wanted: Filter) -> Sequence[Entry]:
        return [_entry(row) for row in self._connection.execute(_wanted(wanted)).mappings()]

    def after(self, entry_id: int, *, limit: int) -> Sequence[Entry]:
        statement = select(entries).where(entries.c.id > entry_id).order_by(entries.c.id).limit(limit)
        return [_entry(row) for row in self._connection.execute(statement).mappings()]

    def newest_before(self, at: datetime) -> int:
        statement = select(func.max(entries.c.id)).where(entries.c.at_us < microseconds_of(at))
        found: int | None = self._connection.scalar(statement)
        return found or 0

    def opened(self) -> Sequence[OpenAct]:
        rows = self._connection.execute(select(opened).order_by(opened.c.id)).mappings()
        return [OpenAct(row["id"], instant_of(row["at_us"]), _act(row)) for row in rows]

    def add(self, entry: Entry) -> None:
        self._connection.execute(insert(entries).values(_entry_row(entry)))

    def remove_through(self, entry_id: int) -> int:
        removed: int = self._connection.execute(delete(entries).where(entries.c.id <= entry_id)).rowcount
        return removed

    def open(self, act: Act, *, at: datetime) -> int:
        row = {"at_us": microseconds_of(at), **_act_row(act)}
        open_id: int | None = self._connection.scalar(insert(opened).values(row).returning(opened.c.id))
        assert open_id is not None, "an insert that did not raise has made a row"
        return open_id

    def describe(self, open_id: int, act: Act) -> None:
        self._connection.execute(update(opened).where(opened.c.id == open_id).values(_act_row(act)))

    def close(self, open_id: int) -> None:
        self._connection.execute(delete(opened).where(opened.c.id == open_id))


def _wanted(wanted: Filter) -> Select[Any]:
    statement = select(entries).order_by(entries.c.id.desc()).limit(wanted.limit)
    if wanted.before is not None:
        statement = statement.where(entries.c.id < wanted.before)
    if wanted.operator is not None:
        statement = statement.where(entries.c.operator == wanted.operator)
    if wanted.target is not None:
        statement = statement.where(entries.c.target == wanted.target)
    if wanted.since is not None:
        statement = statement.where(entries.c.at_us >= microseconds_of(wanted.since))
    if wanted.action is None:
        return statement
    if wanted.action.endswith("."):
        return statement.where(entries.c.action.startswith(wanted.action, autoescape=True))
    return statement.where(entries.c.action == wanted.action)


# ---- rows -----------------------------------------------------------------------------------------------------


def _act(row: RowMapping) -> Act:
    return Act(Actor(row["operator"], row["role"], row["source"]), row["action"], row["target"], row["detail"])


def _act_row(act: Act) -> dict[str, Any]:
    return {
        "operator": act.actor.name,
        "role": act.actor.role,
        "source": act.actor.source,
        "action": act.action,
        "target": act.target,
        "detail": act.detail,
    }


def _entry(row: RowMapping) -> Entry:
    return Entry(
        id=row["id"],
        at=instant_of(row["at_us"]),
        act=_act(row),
        result=Result(Outcome(row["outcome"]), row["code"]),
        previous_sha256=row["previous_sha256"],
        sha256=row["sha256"],
    )


def _entry_row(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "at_us": microseconds_of(entry.at),
        **_act_row(entry.act),
        "outcome": entry.result.outcome.value,
        "code": entry.result.code,
        "previous_sha256": entry.previous_sha256,
        "sha256": entry.sha256,
    }
