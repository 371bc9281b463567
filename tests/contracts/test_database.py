"""What every kind of database promises to the stores; run on each of them."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import DBAPIError

from controller.storage import database as module
from controller.storage.database import Database
from controller.storage.tables import enrolment_tokens, metadata, models, publications
from core.errors import Overloaded, Unavailable
from tests.support.databases import SQL_KINDS, migrated_database


@pytest.fixture(params=SQL_KINDS)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    async with migrated_database(request, tmp_path) as database:
        yield database


def add_model(connection: Connection, name: str = "meter") -> None:
    connection.execute(insert(models).values(name=name, created_us=0))


def names(connection: Connection) -> list[str]:
    return list(connection.scalars(select(models.c.name).order_by(models.c.name)))


async def test_a_migrated_database_is_what_the_tables_say(database: Database) -> None:
    def differences(connection: Connection) -> Any:
        return compare_metadata(MigrationContext.configure(connection), metadata)

    assert await database.read(differences) == []


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


async def test_more_use_cases_than_may_wait_are_refused(database: Database) -> None:
    go_on = threading.Event()
    waiting = [asyncio.create_task(database.run(lambda _: go_on.wait(10))) for _ in range(module.MAX_WAITING)]
    await asyncio.sleep(0)

    with pytest.raises(Overloaded):
        await database.read(names)

    go_on.set()
    await asyncio.gather(*waiting)


async def test_a_reader_cannot_write(database: Database) -> None:
    # A defect of ours in either case; SQLite cannot tell it from a file that may not be written.
    with pytest.raises((Unavailable, DBAPIError), match=r"readonly|read-only"):
        await database.read(add_model)

    assert await database.read(names) == []


async def test_a_reader_sees_one_snapshot_from_its_first_look_to_its_last(database: Database) -> None:
    looked, go_on = threading.Event(), threading.Event()

    def look_twice(connection: Connection) -> tuple[list[str], list[str]]:
        before = names(connection)
        looked.set()
        assert go_on.wait(10)
        return before, names(connection)

    looking = asyncio.create_task(database.read(look_twice))
    await asyncio.to_thread(looked.wait, 10)
    await database.run(add_model)
    go_on.set()

    assert await looking == ([], [])


async def test_names_sort_byte_by_byte(database: Database) -> None:
    # In the order of most languages `-` and `.` count for nothing, and capitals for little.
    unsorted = ["ab", "a-c", "B", "a.d", "a"]
    for name in unsorted:
        await database.run(lambda connection, name=name: add_model(connection, name))  # type: ignore[misc]

    assert await database.read(names) == sorted(unsorted)


async def test_what_breaks_a_constraint_is_refused_and_the_next_use_case_works(database: Database) -> None:
    def overdraw(connection: Connection) -> None:
        row = {"id": "t", "secret_sha256": "", "site": "s", "created_by": "a", "created_us": 0, "expires_us": 0}
        connection.execute(insert(enrolment_tokens).values(uses_left=-1, **row))

    with pytest.raises(DBAPIError, match="uses_left_counted"):
        await database.run(overdraw)
    await database.run(add_model)

    assert await database.read(names) == ["meter"]


async def test_free_text_may_hold_any_character(database: Database) -> None:
    def record(connection: Connection) -> None:
        row = {"id": "p", "model": "m", "state": "failed", "stage": "", "done_ratio": 0, "created_us": 0}
        connection.execute(insert(publications).values(error_message="op 'a\0ü' is unknown", updated_us=0, **row))

    await database.run(record)

    assert await database.read(lambda connection: connection.scalar(select(publications.c.error_message))) == (
        "op 'a\N{SYMBOL FOR NULL}ü' is unknown"
    )
