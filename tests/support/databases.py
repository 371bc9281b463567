"""A migrated database of each kind, for suites that every kind must pass.

@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    ...
    async with migrated_database(request, tmp_path) as database:
        yield SqlStore(database)
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from controller.storage.database import Database
from tests.support.postgresql import Postgresql

SQL_KINDS = ("sqlite", "postgresql")


@asynccontextmanager
async def migrated_database(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Database]:
    """Yield a database of the kind that is the parameter of the fixture, with this release's tables and no rows."""
    database = new_database(request, folder)
    await database.migrate()
    try:
        yield database
    finally:
        await database.close()


def new_database(request: pytest.FixtureRequest, folder: Path) -> Database:
    """Return an empty database of the kind that is the parameter of the fixture; it is closed by the caller."""
    if request.param == "sqlite":
        return Database(f"sqlite:///{folder / 'test.sqlite'}")
    server: Postgresql = request.getfixturevalue("postgresql")
    return Database(server.new_database(), password_file=server.password_file)
