"""Whole copies of the controller's database: taken from one that is in use, and marked when one is brought back."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from controller.fleet import use_cases
from controller.storage.database import Database
from controller.storage.fleet import fleet_records
from core.errors import IntegrityError, Unavailable

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Chosen: long enough for a burst of writes, short enough to be noticed.
BUSY_TIMEOUT_S = 30.0


def copy_database(source: Path, target: Path) -> None:
    """Copy a database as of one instant, whoever writes to it meanwhile, into a file that needs no others beside it.

    Raises:
        Unavailable: it cannot be read, or the target not written.
        IntegrityError: the copy is damaged, and so is the source.
    """
    try:
        with (
            closing(sqlite3.connect(source, timeout=BUSY_TIMEOUT_S)) as read,
            closing(sqlite3.connect(target)) as written,
        ):
            # All pages in one step: a writer in between would make it begin anew.
            read.backup(written, pages=-1)
            written.execute("PRAGMA journal_mode = DELETE")
            (verdict,) = written.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.Error as error:
        raise Unavailable(f"{source}: cannot be copied: {error}") from error
    if verdict != "ok":
        raise IntegrityError(f"{source}: the database is damaged: {verdict}")


def highest_epoch(database: Path) -> int | None:
    """Return the highest epoch that was given or heard of; None: the database cannot be read any more."""
    try:
        return asyncio.run(_with(database, lambda connection: use_cases.highest_epoch(fleet_records(connection))))
    except (Unavailable, DBAPIError) as error:
        _log.warning("the state that is replaced cannot be read", extra={"database": str(database)}, exc_info=error)
        return None


def mark_restored(database: Path, *, backup_at: datetime, now: datetime, above_epoch: int) -> None:
    """Write into a database that it was brought back, with an epoch above all that it and the one before it know."""
    asyncio.run(
        _with(
            database,
            lambda connection: use_cases.mark_restored(
                fleet_records(connection), backup_at=backup_at, now=now, above_epoch=above_epoch
            ),
        )
    )


async def _with(path: Path, use_case: Callable[[Connection], T]) -> T:
    database = Database(f"sqlite:///{path}")
    try:
        await database.migrate()
        return await database.run(use_case)
    finally:
        await database.close()
