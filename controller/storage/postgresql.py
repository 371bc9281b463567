"""PostgreSQL as the controller's database: how it is reached, bounded, and held by one controller alone.

The connection that writes holds an advisory lock of the database from its first moment to its last, and takes it anew
whenever it is made anew, as after a restart of the server: what is written is written under the lock, always. The
lock goes with the connection, so a controller that died leaves none behind; one that the network cut off is noticed by
the server within DEAD_PEER_S.

A connection that the server closed meanwhile is replaced before a transaction begins on it. A transaction that has
begun is never tried again: nobody knows whether its commit was heard.
"""

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.pool import ConnectionPoolEntry

from core.addresses import is_loopback
from core.errors import Conflict, InvalidRequest, Unavailable

if TYPE_CHECKING:
    import psycopg

    Session: TypeAlias = psycopg.Connection[tuple[Any, ...]]

# Two halves of the lock's number, as PostgreSQL takes them: "nano" and "flee" in ASCII.
LOCK = (0x6E616E6F, 0x666C6565)
# Chosen: as long as SQLite waits for its lock.
LOCK_TIMEOUT_MS = 5000
# Chosen: the longest use case takes a fraction of a second; longer means that the server is in trouble.
STATEMENT_TIMEOUT_MS = 30_000
# Chosen: a use case computes between its statements, it never waits.
IDLE_IN_TRANSACTION_TIMEOUT_MS = 60_000
CONNECT_TIMEOUT_S = 5
# Silence after which either end asks whether the other is there, and for how long it asks.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 10, 5, 3
DEAD_PEER_S = KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_COUNT
MAX_PASSWORD_BYTES = 4096

# Names are compared byte by byte everywhere else; `-` and `.` count for nothing in most languages' order.
_SORTS_BY_BYTES = "SELECT 'B' < 'a' AND 'a-b' < 'aa' AND 'a.b' < 'aa'"
_HOLDER = """
    SELECT a.application_name || coalesce(' at ' || host(a.client_addr), '') || ' since ' || a.backend_start
    FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND (l.classid, l.objid, l.objsubid) = (%s, %s, 2)
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class HeldByAnother(Conflict):
    """Another controller holds the database."""


def writer(url: str, password_file: Path | None) -> Engine:
    """Return the one connection that writes, and that holds the lock."""
    engine = _engine(url, connections=1, isolation="SERIALIZABLE")
    _listen(engine, password_file, is_holder=True)
    return engine


def reader(url: str, password_file: Path | None, *, connections: int) -> Engine:
    """Return connections that refuse to write; each transaction sees one snapshot."""
    engine = _engine(url, connections=connections, isolation="REPEATABLE READ")
    _listen(engine, password_file, is_holder=False)
    return engine.execution_options(postgresql_readonly=True)


def _engine(url: str, *, connections: int, isolation: str) -> Engine:
    parsed = make_url(url)
    try:
        return create_engine(
            parsed,
            pool_size=connections,
            max_overflow=0,
            pool_pre_ping=True,
            isolation_level=isolation,
            connect_args=parameters(parsed),
        )
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            "database_url: PostgreSQL needs a driver that is not installed here; pip install 'nanofleet[postgresql]'"
        ) from error


def parameters(url: URL) -> dict[str, Any]:
    """Return what libpq is told beside the address; what stands in the address wins."""
    parameters: dict[str, Any] = {
        "application_name": f"nanofleet controller {os.getpid()} on {socket.gethostname()}",
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": KEEPALIVE_IDLE_S,
        "keepalives_interval": KEEPALIVE_INTERVAL_S,
        "keepalives_count": KEEPALIVE_COUNT,
        "tcp_user_timeout": DEAD_PEER_S * 1000,
    }
    if url.host is not None and not is_loopback(url.host):
        # Its own default falls back to clear text when the other end, whoever that is, asks for it.
        parameters["sslmode"] = "verify-full"
    return {name: value for name, value in parameters.items() if name not in url.query}


def _listen(engine: Engine, password_file: Path | None, *, is_holder: bool) -> None:
    @event.listens_for(engine, "do_connect")
    def _connect(
        dialect: Dialect, _entry: ConnectionPoolEntry, arguments: list[Any], parameters: dict[str, Any]
    ) -> DBAPIConnection:
        # Read for every connection: a password may be changed while the controller runs.
        secret = {} if password_file is None else {"password": _password(password_file)}
        connection = dialect.connect(*arguments, **parameters, **secret)
        try:
            _prepare(cast("Session", connection), is_holder=is_holder)
        except BaseException:
            connection.close()
            raise
        return connection


def _password(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PASSWORD_BYTES + 1)
        text = content.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"database_password_file: {path}: cannot be read: {error}") from error
    if not text or len(content) > MAX_PASSWORD_BYTES or "\0" in text:
        raise Unavailable(f"database_password_file: {path}: expected one password of up to {MAX_PASSWORD_BYTES} bytes")
    return text


def _prepare(connection: "Session", *, is_holder: bool) -> None:
    """Bound the session, and hold the database with it.

    Raises:
        HeldByAnother: another controller does.
        InvalidRequest: the database compares text otherwise than byte by byte, or is not in UTF-8.
    """
    # What is set in a transaction goes when that is undone.
    connection.autocommit = True
    connection.execute(
        f"SET statement_timeout = {STATEMENT_TIMEOUT_MS};"
        f"SET lock_timeout = {LOCK_TIMEOUT_MS};"
        f"SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_TIMEOUT_MS};"
        f"SET tcp_keepalives_idle = {KEEPALIVE_IDLE_S};"
        f"SET tcp_keepalives_interval = {KEEPALIVE_INTERVAL_S};"
        f"SET tcp_keepalives_count = {KEEPALIVE_COUNT}"
    )
    if is_holder:
        _require_fit(connection)
        _hold(connection)
    connection.autocommit = False


def _require_fit(connection: "Session") -> None:
    encoding = _scalar(connection, "SHOW server_encoding")
    if encoding == "UTF8" and _scalar(connection, _SORTS_BY_BYTES):
        return
    found = "one in the order of a language" if encoding == "UTF8" else f"encoding {encoding}"
    raise InvalidRequest(
        f"database_url: expected a database in UTF-8 that sorts byte by byte, got {found}; make one with "
        "`createdb --template=template0 --encoding=UTF8 --locale=C`"
    )


def _hold(connection: "Session") -> None:
    if _scalar(connection, "SELECT pg_try_advisory_lock(%s, %s)", LOCK):
        return
    holder = _scalar(connection, _HOLDER, LOCK) or "one that has just gone"
    raise HeldByAnother(
        f"database: expected to be the only controller on it, found another: {holder}; "
        "stop that one, or give this one a database of its own"
    )


def _scalar(connection: "Session", query: str, values: tuple[int, ...] = ()) -> Any:
    row = connection.execute(query, values).fetchone()
    return None if row is None else row[0]
