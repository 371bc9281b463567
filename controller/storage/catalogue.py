"""The catalogue on SQL; see the port `controller.signing.store` for what each method promises."""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, func, insert, select

from controller.signing.model import KeyRole, RoleFile, StagedFile
from controller.signing.store import KEPT_VERSIONS
from controller.storage.database import Database
from controller.storage.instants import instant_of, microseconds_of
from controller.storage.tables import catalogue_metadata as published
from controller.storage.tables import catalogue_staged as staged_files
from core.errors import Conflict, NotFound

_COLUMNS = (published.c.role, published.c.version, published.c.content)


class SqlCatalogueStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def newest(self) -> Sequence[RoleFile]:
        return await self._database.read(_select_newest)

    async def file(self, role: str, version: int) -> RoleFile:
        return await self._database.read(lambda connection: _select_file(connection, role, version))

    async def staged(self) -> Sequence[StagedFile]:
        return await self._database.read(_select_staged)

    async def publish(self, files: Sequence[RoleFile], *, staged: Sequence[StagedFile]) -> None:
        await self._database.run(lambda connection: _publish(connection, files, staged))


def _select_newest(connection: Connection) -> Sequence[RoleFile]:
    newest = select(published.c.role, func.max(published.c.version).label("version")).group_by(published.c.role)
    of = newest.subquery()
    joined = published.join(of, (published.c.role == of.c.role) & (published.c.version == of.c.version))
    statement = select(*_COLUMNS).select_from(joined).order_by(published.c.role)
    return [RoleFile(*row) for row in connection.execute(statement)]


def _select_file(connection: Connection, role: str, version: int) -> RoleFile:
    statement = select(*_COLUMNS).where(published.c.role == role, published.c.version == version)
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise NotFound(f"catalogue: no version {version} of {role}")
    return RoleFile(*row)


def _select_staged(connection: Connection) -> Sequence[StagedFile]:
    statement = select(staged_files.c.role, staged_files.c.content, staged_files.c.created_us).order_by(
        staged_files.c.role
    )
    return [
        StagedFile(role, content, instant_of(created_us)) for role, content, created_us in connection.execute(statement)
    ]


def _publish(connection: Connection, files: Sequence[RoleFile], staged: Sequence[StagedFile]) -> None:
    for file in files:
        _add(connection, file)
    connection.execute(delete(staged_files))
    for each in staged:
        row = {"role": each.role, "content": each.content, "created_us": microseconds_of(each.created_at)}
        connection.execute(insert(staged_files).values(row))


def _add(connection: Connection, file: RoleFile) -> None:
    newest = connection.scalar(select(func.max(published.c.version)).where(published.c.role == file.role)) or 0
    if file.version != newest + 1:
        raise Conflict(f"catalogue: expected version {newest + 1} of {file.role}, got {file.version}; try again")
    row = {"role": file.role, "version": file.version, "content": file.content}
    connection.execute(insert(published).values(row))
    if file.role != KeyRole.ROOT:
        kept = 1 if file.role == KeyRole.TIMESTAMP else KEPT_VERSIONS
        too_old = (published.c.role == file.role) & (published.c.version <= file.version - kept)
        connection.execute(delete(published).where(too_old))
