"""The queue on SQLite, in WAL mode. Every method blocks on the disk and belongs to the outbox's one thread.

Each method that changes something is one transaction, durable on return (`synchronous=FULL`: one fsync of the WAL).
The file belongs to one process (the state folder is locked), so the WAL's index lives in memory (`locking_mode`
EXCLUSIVE) and a full disk cannot end the process with a fault in a mapped file. Errors are sqlite3's; `storage` sorts
them. Why these pragmas, with what they cost: ADR 28.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from edge_agent.outbox.ageing import Anchor
from edge_agent.outbox.rows import Kind, NewRow, Row, Tally

FORMAT = 1
_PAGE_BYTES = 4096
# Chosen: the WAL is written back into the file, and used again from its start, at a megabyte.
_CHECKPOINT_PAGES, _MAX_WAL_BYTES = 256, 1 << 20
_CACHE_KIB = 256
# Chosen: free pages beyond this are given back to the file system, so many at a time.
_SPARE_PAGES, _FREED_AT_ONCE = 256, 256
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    dedupe_id TEXT NOT NULL,
    body BLOB NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes > 0),
    born_s REAL NOT NULL,
    at_us INTEGER NOT NULL,
    UNIQUE (kind, dedupe_id)
);
CREATE INDEX IF NOT EXISTS rows_by_kind ON rows (kind, number);
CREATE TABLE IF NOT EXISTS age_clock (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    age_s REAL NOT NULL,
    wall_s REAL NOT NULL,
    boot_id TEXT NOT NULL,
    boot_s REAL NOT NULL
);
"""
Connect: TypeAlias = Callable[[Path], sqlite3.Connection]


def connect(path: Path) -> sqlite3.Connection:
    """Open `path` for whichever thread uses it; made, for its owner alone, when it is not there."""
    if not path.exists():
        # What waits are payloads. The files beside it take over its mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)


class Unusable(sqlite3.DatabaseError):
    """It opens, and is not what we wrote."""


class Database:
    def __init__(self, path: Path, *, max_bytes: int, connect: Connect = connect) -> None:
        """Open, look whether it is whole, and make what is missing.

        Raises:
            sqlite3.Error: it cannot be opened, is damaged (DatabaseError), or cannot be written.
        """
        self._db = connect(path)
        try:
            self._prepare(max_bytes)
            self._tallies = {kind: self._counted(kind) for kind in Kind}
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, max_bytes: int) -> None:
        run = self._db.execute
        # First: what reads the file before it makes the WAL's index a file too, for which a full disk has no room.
        run("PRAGMA locking_mode = EXCLUSIVE")
        [version] = run("PRAGMA user_version").fetchone()
        if version not in {0, FORMAT}:
            raise Unusable(f"expected format {FORMAT} of the outbox, got {version}")
        if version == 0:
            # Before there is a table; said again, it would be written again.
            run(f"PRAGMA page_size = {_PAGE_BYTES}")
            run("PRAGMA auto_vacuum = INCREMENTAL")
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            f"journal_size_limit = {_MAX_WAL_BYTES}",
            f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
            f"cache_size = -{_CACHE_KIB}",
            "temp_store = MEMORY",
            # A last bound, above ours: a defect of ours must not fill the disk.
            f"max_page_count = {2 * max_bytes // _PAGE_BYTES + 1024}",
        ):
            run(f"PRAGMA {pragma}")
        [verdict] = run("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise Unusable(f"quick_check: {str(verdict)[:200]}")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {FORMAT};COMMIT;")

    def close(self) -> None:
        self._db.close()

    # ---- the axis of ages --------------------------------------------------------------------------------------

    def anchor(self) -> Anchor | None:
        row = self._db.execute("SELECT age_s, wall_s, boot_id, boot_s FROM age_clock").fetchone()
        return None if row is None else Anchor(*row)

    def save_anchor(self, anchor: Anchor) -> None:
        with self._transaction():
            self._write_anchor(anchor)

    def _write_anchor(self, anchor: Anchor) -> None:
        self._db.execute("INSERT OR REPLACE INTO age_clock VALUES (1, ?, ?, ?, ?)", anchor)

    # ---- the queue ---------------------------------------------------------------------------------------------

    def add(self, rows: list[NewRow], anchor: Anchor | None = None) -> None:
        """Append rows, and write the axis of ages down with them."""
        with self._transaction():
            for row in rows:
                self._delete("kind = ? AND dedupe_id = ?", (row.kind, row.dedupe_id), row.kind)
                self._db.execute(
                    "INSERT INTO rows (kind, dedupe_id, body, size_bytes, born_s, at_us) VALUES (?, ?, ?, ?, ?, ?)",
                    (row.kind, row.dedupe_id, row.body, row.size_bytes, row.born_s, row.at_us),
                )
                self._tell(row.kind, 1, row.size_bytes)
            if anchor is not None:
                self._write_anchor(anchor)

    def oldest(self, kind: Kind, *, limit: int, max_bytes: int) -> list[Row]:
        """Return the first rows of a kind, at least one if there is one, of `max_bytes` together."""
        found: list[Row] = []
        size_bytes = 0
        # Read row by row: bodies beyond `max_bytes` stay on disk.
        cursor = self._db.execute(
            "SELECT number, dedupe_id, size_bytes, born_s, at_us FROM rows WHERE kind = ? ORDER BY number LIMIT ?",
            (kind, limit),
        )
        for number, dedupe_id, row_bytes, born_s, at_us in cursor.fetchall():
            size_bytes += row_bytes
            if found and size_bytes > max_bytes:
                break
            [body] = self._db.execute("SELECT body FROM rows WHERE number = ?", (number,)).fetchone()
            found.append(Row(number, kind, dedupe_id, body, born_s, at_us))
        return found

    def remove(self, numbers: list[int]) -> None:
        with self._transaction():
            for number in numbers:
                found = self._db.execute("SELECT kind FROM rows WHERE number = ?", (number,)).fetchone()
                if found is not None:
                    self._delete("number = ?", (number,), Kind(found[0]))

    def tally(self, kind: Kind) -> Tally:
        return self._tallies[kind]

    def shed_oldest(self, kind: Kind, rows: int) -> None:
        oldest = "number IN (SELECT number FROM rows WHERE kind = ? ORDER BY number LIMIT ?)"
        with self._transaction():
            self._delete(oldest, (kind, rows), kind)

    def shed_bytes(self, kind: Kind, size_bytes: int) -> int:
        shed = 0
        for (row_bytes,) in self._db.execute("SELECT size_bytes FROM rows WHERE kind = ? ORDER BY number", (kind,)):
            if size_bytes <= 0:
                break
            size_bytes -= row_bytes
            shed += 1
        if shed:
            self.shed_oldest(kind, shed)
        return shed

    def shed_older(self, kind: Kind, born_before_s: float) -> int:
        oldest_s = self._tallies[kind].oldest_s
        if oldest_s is None or oldest_s >= born_before_s:
            return 0
        with self._transaction():
            return self._delete("kind = ? AND born_s < ?", (kind, born_before_s), kind)

    def give_back(self) -> None:
        """Return pages to the file system that nobody needs, a part at a time."""
        [free_pages] = self._db.execute("PRAGMA freelist_count").fetchone()
        if free_pages > _SPARE_PAGES:
            # As a script: it gives a row without columns for each page, and `execute` stops at the first of those.
            self._db.executescript(f"PRAGMA incremental_vacuum({_FREED_AT_ONCE})")

    # ---- inside ------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, in the file and in the tallies."""
        before = dict(self._tallies)
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            for kind in Kind:
                self._look_for_oldest(kind)
            self._db.execute("COMMIT")
        except BaseException:
            self._tallies = before
            # Some errors end a transaction by themselves.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _delete(self, where: str, values: tuple[object, ...], kind: Kind) -> int:
        """Delete rows of `kind`; the words of `where` are ours."""
        sizes = self._db.execute(f"DELETE FROM rows WHERE {where} RETURNING size_bytes", values).fetchall()  # noqa: S608
        if sizes:
            self._tell(kind, -len(sizes), -sum(size for (size,) in sizes))
        return len(sizes)

    def _tell(self, kind: Kind, rows: int, size_bytes: int) -> None:
        known = self._tallies[kind]
        self._tallies[kind] = Tally(known.rows + rows, known.size_bytes + size_bytes, known.oldest_s)

    def _look_for_oldest(self, kind: Kind) -> None:
        found = self._db.execute("SELECT born_s FROM rows WHERE kind = ? ORDER BY number LIMIT 1", (kind,)).fetchone()
        known = self._tallies[kind]
        self._tallies[kind] = Tally(known.rows, known.size_bytes, None if found is None else found[0])

    def _counted(self, kind: Kind) -> Tally:
        statement = "SELECT count(*), coalesce(sum(size_bytes), 0) FROM rows WHERE kind = ?"
        rows, size_bytes = self._db.execute(statement, (kind,)).fetchone()
        found = self._db.execute("SELECT born_s FROM rows WHERE kind = ? ORDER BY number LIMIT 1", (kind,)).fetchone()
        return Tally(rows, size_bytes, None if found is None else found[0])
