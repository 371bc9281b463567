"""The one database of the controller, and the threads that may wait for it.

SQLAlchemy is used synchronously, on threads of our own: a use case is a function over a connection, and `run` carries
it to the single writer thread as one transaction, so that it costs one hop however many statements it holds. One
thread makes waiting for SQLite's one lock a queue instead of a race, and a controller is alone on a PostgreSQL. `read`
does the same on a few reader threads, whose connections refuse to write.

`sqlite` and `postgresql` say how each is connected to. The stores of the features (`registry`, `fleet`, `traces` and
so on) are the only callers, and the same on both.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from controller.storage import postgresql, sqlite
from controller.storage.postgresql import HeldByAnother
from core.errors import Overloaded, Unavailable

T = TypeVar("T")

# Chosen: both kinds serve thousands of small transactions a second; a longer queue means that it is stuck.
MAX_WAITING = 4096
READER_THREADS = 2


class Database:
    """Engines and threads over `url`; nothing is opened before `migrate`, which comes before anything else.

    Args:
        url: `sqlite:///path` or `postgresql+psycopg://user@host:port/name`, with what libpq knows after a `?`.
        password_file: a file that holds the password for `url`; PostgreSQL only.

    Raises:
        InvalidRequest: the driver is not installed.
    """

    def __init__(self, url: str, *, password_file: Path | None = None) -> None:
        if url.startswith("sqlite:"):
            self._writer = sqlite.writer(url)
            self._reader = sqlite.reader(url, connections=READER_THREADS)
        else:
            self._writer = postgresql.writer(url, password_file)
            self._reader = postgresql.reader(url, password_file, connections=READER_THREADS)
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="database-writer")
        self._reader_threads = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="database-reader")
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Use cases that have begun or wait to."""
        return self._waiting

    async def run(self, use_case: Callable[[Connection], T]) -> T:
        """Run `use_case` as one transaction on the writer thread: committed when it returns, undone when it raises.

        Cancelling the caller does not undo it: what has begun ends in its thread, whole.

        Raises:
            Overloaded: too many use cases are waiting.
            Unavailable: the database is away, locked, full or unreadable, or belongs to another controller by now.
                Where the connection broke in mid-commit, nobody knows whether it was done.
        """
        try:
            return await self._hop(self._writer_thread, self._writer, use_case)
        except HeldByAnother as error:
            # It was ours, or we would not have started: the callers cannot help it, and it may be ours again.
            raise Unavailable(str(error)) from error

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run `query` on a reader thread, over one consistent snapshot; it cannot write. Raises as `run` does."""
        return await self._hop(self._reader_threads, self._reader, query)

    async def migrate(self) -> None:
        """Bring the schema to this release's, in one transaction; nothing happens when it is there already.

        Raises:
            Conflict: another controller runs on it.
            InvalidRequest: it was made in a way that we cannot use.
            Unavailable: as `run`.
        """
        await self._hop(self._writer_thread, self._writer, _upgrade)

    async def close(self) -> None:
        """Finish what is queued, then close every connection."""
        for threads in (self._writer_thread, self._reader_threads):
            await asyncio.to_thread(threads.shutdown)
        self._reader.dispose()
        self._writer.dispose()

    async def _hop(self, threads: ThreadPoolExecutor, engine: Engine, use_case: Callable[[Connection], T]) -> T:
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"database: {self._waiting} use cases are waiting; try again later")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, _transaction, engine, use_case)
        except DBAPIError as error:
            if isinstance(error, OperationalError) or error.connection_invalidated:
                raise Unavailable(f"database: {_reason(error)}; try again later") from error
            raise
        finally:
            self._waiting -= 1


def _transaction(engine: Engine, use_case: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return use_case(connection)


def _reason(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        # A step may copy a large table.
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    config = alembic.config.Config()
    config.set_main_option("script_location", "controller.storage:migrations")
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
