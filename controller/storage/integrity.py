"""Looking at a controller's database without being its controller: read only, also beside one that runs."""

import sqlite3
from contextlib import closing
from pathlib import Path

_BUSY_TIMEOUT_S = 5.0
# What is wrong with one page is often wrong with many.
_MAX_FAULTS = 5


def quick_check(path: Path) -> list[str]:
    """Return what SQLite's `PRAGMA quick_check` finds wrong in the database file `path`; nothing: it is whole.

    A file that is no database is a fault as well.
    """
    try:
        with closing(_opened(path)) as connection:
            rows = connection.execute(f"PRAGMA quick_check({_MAX_FAULTS})").fetchall()
    except sqlite3.Error as error:
        return [str(error)]
    return [row[0] for row in rows if row[0] != "ok"]


def newest_metadata(path: Path) -> dict[str, bytes]:
    """Return the newest signed metadata of every role of the catalogue; nothing: none was made yet."""
    statement = "SELECT role, content, max(version) FROM catalogue_metadata GROUP BY role"
    try:
        with closing(_opened(path)) as connection:
            return {role: content for role, content, _ in connection.execute(statement)}
    except sqlite3.Error:
        # `quick_check` says what is wrong with it.
        return {}


def _opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S)
