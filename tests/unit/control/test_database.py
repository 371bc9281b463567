"""SQLite as the database; what every kind promises is in tests/contracts."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, inspect, text

from controller.storage.database import Database
from controller.storage.tables import metadata
from core.errors import Unavailable


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    await database.migrate()
    yield database
    await database.close()


async def test_migrating_and_creating_give_the_same_constraints(database: Database) -> None:
    created = create_engine("sqlite://")
    metadata.create_all(created)

    with created.connect() as connection:
        assert await database.read(constraints) == constraints(connection)
    created.dispose()


def constraints(connection: Connection) -> dict[str, Any]:
    inspector = inspect(connection)
    return {
        table: [
            repr(inspector.get_columns(table)),
            inspector.get_pk_constraint(table),
            inspector.get_foreign_keys(table),
            inspector.get_unique_constraints(table),
            inspector.get_check_constraints(table),
            inspector.get_indexes(table),
        ]
        for table in metadata.tables
    }


async def test_foreign_keys_hold_and_commits_are_durable(database: Database) -> None:
    def pragmas(connection: Connection) -> list[Any]:
        names = ("foreign_keys", "journal_mode", "synchronous")
        return [connection.scalar(text(f"PRAGMA {name}")) for name in names]

    assert await database.run(pragmas) == [1, "wal", 2]


async def test_a_folder_that_is_away_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'missing' / 'test.sqlite'}")

    with pytest.raises(Unavailable, match="unable to open"):
        await database.migrate()

    await database.close()
