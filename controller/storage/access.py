"""Access on SQL; see the port `controller.access.store` for what each method promises."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from controller.access.model import BrowserSession, Operator, OperatorRole
from controller.storage.database import Database
from controller.storage.instants import instant_of, microseconds_of
from controller.storage.tables import browser_sessions, operators
from core.errors import Conflict, NotFound, Unauthenticated


class SqlAccessStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def operators(self) -> Sequence[Operator]:
        return await self._database.read(_select_operators)

    async def add_operator(self, operator: Operator) -> None:
        await self._database.run(lambda connection: _add_operator(connection, operator))

    async def replace_secret(self, name: str, secret_sha256: str) -> Operator:
        return await self._database.run(lambda connection: _replace_secret(connection, name, secret_sha256))

    async def remove_operator(self, name: str) -> None:
        await self._database.run(lambda connection: _remove_operator(connection, name))

    async def add_session(self, session: BrowserSession, *, secret_sha256: str, keep: int) -> None:
        await self._database.run(lambda connection: _add_session(connection, session, secret_sha256, keep))

    async def session(self, token_sha256: str) -> tuple[BrowserSession, Operator] | None:
        return await self._database.read(lambda connection: _session_of(connection, token_sha256))

    async def extend_session(self, token_sha256: str, *, expires_at: datetime) -> None:
        statement = (
            update(browser_sessions)
            .where(browser_sessions.c.token_sha256 == token_sha256)
            .values(expires_us=microseconds_of(expires_at))
        )
        await self._database.run(lambda connection: connection.execute(statement))

    async def remove_session(self, token_sha256: str) -> None:
        statement = delete(browser_sessions).where(browser_sessions.c.token_sha256 == token_sha256)
        await self._database.run(lambda connection: connection.execute(statement))

    async def remove_expired_sessions(self, *, now: datetime) -> int:
        statement = delete(browser_sessions).where(browser_sessions.c.expires_us < microseconds_of(now))
        return await self._database.run(lambda connection: connection.execute(statement).rowcount)


# ---- operators ------------------------------------------------------------------------------------------------


def _select_operators(connection: Connection) -> Sequence[Operator]:
    return [_operator(row) for row in connection.execute(select(operators).order_by(operators.c.name)).mappings()]


def _operator_named(connection: Connection, name: str) -> Operator:
    row = connection.execute(select(operators).where(operators.c.name == name)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"operator {name!r}: not known here; see `nanofleet operators list`")
    return _operator(row)


def _add_operator(connection: Connection, operator: Operator) -> None:
    try:
        connection.execute(insert(operators).values(_operator_row(operator)))
    except IntegrityError as error:
        raise Conflict(
            f"operator {operator.name!r}: exists already; choose another name, or rotate its secret"
        ) from error


def _replace_secret(connection: Connection, name: str, secret_sha256: str) -> Operator:
    connection.execute(update(operators).where(operators.c.name == name).values(secret_sha256=secret_sha256))
    connection.execute(delete(browser_sessions).where(browser_sessions.c.operator == name))
    return _operator_named(connection, name)


def _remove_operator(connection: Connection, name: str) -> None:
    is_admin = operators.c.role == OperatorRole.ADMIN.value
    admins = connection.scalar(select(func.count()).select_from(operators).where(is_admin))
    if _operator_named(connection, name).role is OperatorRole.ADMIN and admins == 1:
        raise Conflict(f"operator {name!r}: expected another admin to remain, this is the last; add one first")
    connection.execute(delete(operators).where(operators.c.name == name))


# ---- browser sessions -----------------------------------------------------------------------------------------


def _add_session(connection: Connection, session: BrowserSession, secret_sha256: str, keep: int) -> None:
    by_secret = select(operators.c.secret_sha256).where(operators.c.name == session.operator)
    if connection.scalar(by_secret) != secret_sha256:
        raise Unauthenticated(f"operator {session.operator!r}: removed or given another secret meanwhile")
    connection.execute(insert(browser_sessions).values(_session_row(session)))
    of_operator = browser_sessions.c.operator == session.operator
    newest = (
        select(browser_sessions.c.token_sha256)
        .where(of_operator)
        .order_by(browser_sessions.c.created_us.desc(), browser_sessions.c.token_sha256)
        .limit(keep)
    )
    connection.execute(
        delete(browser_sessions).where(of_operator, browser_sessions.c.token_sha256.not_in(newest.scalar_subquery()))
    )


def _session_of(connection: Connection, token_sha256: str) -> tuple[BrowserSession, Operator] | None:
    statement = select(browser_sessions).where(browser_sessions.c.token_sha256 == token_sha256)
    row = connection.execute(statement).mappings().one_or_none()
    return None if row is None else (_session(row), _operator_named(connection, row["operator"]))


# ---- rows -----------------------------------------------------------------------------------------------------


def _operator(row: RowMapping) -> Operator:
    return Operator(row["name"], OperatorRole(row["role"]), row["secret_sha256"], instant_of(row["created_us"]))


def _operator_row(operator: Operator) -> dict[str, Any]:
    return {
        "name": operator.name,
        "role": operator.role.value,
        "secret_sha256": operator.secret_sha256,
        "created_us": microseconds_of(operator.created_at),
    }


def _session(row: RowMapping) -> BrowserSession:
    return BrowserSession(
        row["token_sha256"],
        row["operator"],
        row["csrf_token"],
        instant_of(row["created_us"]),
        instant_of(row["expires_us"]),
    )


def _session_row(session: BrowserSession) -> dict[str, Any]:
    return {
        "token_sha256": session.token_sha256,
        "operator": session.operator,
        "csrf_token": session.csrf_token,
        "created_us": microseconds_of(session.created_at),
        "expires_us": microseconds_of(session.expires_at),
    }
