"""SQLite as the controller's database: a file, one writer, readers beside it.

In WAL mode readers see the last commit while the writer works; `synchronous=FULL` makes a commit survive a power cut.
"""

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

# Chosen: long enough for a checkpoint or a backup that holds the lock, short enough to be noticed.
BUSY_TIMEOUT_MS = 5000


def writer(url: str) -> Engine:
    """Return the one connection that writes; it takes the lock when a transaction begins, not at its first write."""
    return _engine(url, begin="BEGIN IMMEDIATE", connections=1, is_read_only=False)


def reader(url: str, *, connections: int) -> Engine:
    """Return connections that refuse to write; each transaction sees one snapshot."""
    return _engine(url, begin="BEGIN", connections=connections, is_read_only=True)


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
