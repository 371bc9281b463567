"""The database: its migrations, its transactions and its two kinds of threads."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, insert, inspect, select, text

from controller.storage import database as module
from controller.storage.database import Database
from controller.storage.tables import metadata, models
from core.errors import Overloaded, Unavailable


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.sqlite'}")
    await database.migrate()
    yield database
    await database.close()


def add_model(connection: Connection, name: str = "meter") -> None:
    connection.execute(insert(models).values(name=name, created_us=0))


def names(connection: Connection) -> list[str]:
    return list(connection.scalars(select(models.c.name)))


async def test_a_migrated_database_is_what_the_tables_say(database: Database) -> None:
    def differences(connection: Connection) -> Any:
        return compare_metadata(MigrationContext.configure(connection), metadata)

    assert await database.read(differences) == []


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


async def test_migrating_twice_changes_nothing(database: Database) -> None:
    await database.run(add_model)
    await database.migrate()

    assert await database.read(names) == ["meter"]


async def test_a_use_case_that_raises_leaves_nothing(database: Database) -> None:
    def fail(connection: Connection) -> None:
        add_model(connection)
        raise ValueError("after the write")

    with pytest.raises(ValueError, match="after the write"):
        await database.run(fail)

    assert await database.read(names) == []


async def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(Unavailable, match="readonly"):
        await database.read(add_model)


async def test_a_reader_sees_the_last_commit_while_the_writer_works(database: Database) -> None:
    wrote, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        add_model(connection)
        wrote.set()
        assert go_on.wait(10)

    writing = asyncio.create_task(database.run(slow))
    await asyncio.to_thread(wrote.wait, 10)
    seen = await database.read(names)
    go_on.set()
    await writing

    assert (seen, await database.read(names)) == ([], ["meter"])


async def test_foreign_keys_hold_and_commits_are_durable(database: Database) -> None:
    def pragmas(connection: Connection) -> list[Any]:
        names = ("foreign_keys", "journal_mode", "synchronous")
        return [connection.scalar(text(f"PRAGMA {name}")) for name in names]

    assert await database.run(pragmas) == [1, "wal", 2]


async def test_more_use_cases_than_may_wait_are_refused(database: Database) -> None:
    go_on = threading.Event()
    waiting = [asyncio.create_task(database.run(lambda _: go_on.wait(10))) for _ in range(module.MAX_WAITING)]
    await asyncio.sleep(0)

    with pytest.raises(Overloaded):
        await database.read(names)

    go_on.set()
    await asyncio.gather(*waiting)


async def test_a_folder_that_is_away_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'missing' / 'test.sqlite'}")

    with pytest.raises(Unavailable, match="unable to open"):
        await database.migrate()

    await database.close()
