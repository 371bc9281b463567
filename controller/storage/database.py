"""The one database of the controller, and the threads that may wait for it.

SQLAlchemy is used synchronously, on threads of our own: a use case is a function over a connection, and `run` carries
it to the single writer thread as one transaction, so that it costs one hop however many statements it holds. SQLite has
one writer anyway; giving it one thread makes waiting for the lock a queue instead of a race. `read` does the same on a
few reader threads, whose connections refuse to write.

SQLite in WAL mode: readers see the last commit while the writer works; `synchronous=FULL` makes a commit survive a
power cut. The stores of the features (`registry`, `fleet`, `traces`) are the only callers.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from core.errors import Overloaded, Unavailable

T = TypeVar("T")

# Chosen: long enough for a checkpoint or a backup that holds the lock, short enough to be noticed.
BUSY_TIMEOUT_MS = 5000
# Chosen: SQLite serves thousands of small transactions a second; a longer queue means that it is stuck.
MAX_WAITING = 4096
READER_THREADS = 2


class Database:
    """Engines and threads over `url`, a file of SQLite: `sqlite:///path`. Call `migrate` before anything else."""

    def __init__(self, url: str) -> None:
        self._writer = _engine(url, begin="BEGIN IMMEDIATE", connections=1, is_read_only=False)
        self._reader = _engine(url, begin="BEGIN", connections=READER_THREADS, is_read_only=True)
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
            Unavailable: the database is locked by another process, full or unreadable.
        """
        return await self._hop(self._writer_thread, self._writer, use_case)

    async def read(self, query: Callable[[Connection], T]) -> T:
        """Run `query` on a reader thread, over one consistent snapshot; it cannot write. Raises as `run` does."""
        return await self._hop(self._reader_threads, self._reader, query)

    async def migrate(self) -> None:
        """Bring the schema to this release's, in one transaction; nothing happens when it is there already."""
        await self.run(_upgrade)

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
        except OperationalError as error:
            raise Unavailable(f"database: {error.orig}; try again later") from error
        finally:
            self._waiting -= 1


def _transaction(engine: Engine, use_case: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return use_case(connection)


def _engine(url: str, *, begin: str, connections: int, is_read_only: bool) -> Engine:
    engine = create_engine(url, pool_size=connections, max_overflow=0)

    @event.listens_for(engine, "connect")
    def _prepare(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        # The driver would begin late, at the first write; we begin ourselves, so that reads are in the transaction too.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA query_only = {'ON' if is_read_only else 'OFF'}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _upgrade(connection: Connection) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", "controller.storage:migrations")
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
