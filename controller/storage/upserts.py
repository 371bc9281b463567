"""Saving a row whether or not it is there: both databases can, each in a dialect of its own.

The only module that names their dialects, with `traces`, whose database is always SQLite.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, Insert, Table
from sqlalchemy.dialects import postgresql, sqlite

_DIALECTS: dict[str, Callable[[Table], postgresql.Insert | sqlite.Insert]] = {
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
}


def save(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert whole `rows`; one with the primary key of a row that is there takes its place."""
    if rows:
        connection.execute(_saving(connection.dialect.name, table), rows)


@cache
def _saving(dialect: str, table: Table) -> Insert:
    new = _DIALECTS[dialect](table)
    changed = {column.name: new.excluded[column.name] for column in table.c if not column.primary_key}
    return new.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed)
