"""Where the rows are: in the database while the disk does its work, else in memory; the outbox's thread, no errors out.

    ON_DISK ─full, read-only, faulty─▶ IN_MEMORY ─every RETRY_S, if it can be written again─▶ ON_DISK
       └─damaged─▶ set aside as `outbox.corrupt-<time>` (the newest is kept) and begun anew

What is on a disk that takes nothing can still be read and sent; what was sent is then remembered here until it can be
removed. Whatever is lost is counted, by kind and reason; whatever goes wrong leaves an `Incident` to be told of.
"""

import errno
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from core.clock import Clock
from edge_agent.outbox.ageing import AgeClock, Anchor, Boot
from edge_agent.outbox.database import Connect, Database, connect
from edge_agent.outbox.ring import FIRST_NUMBER, Ring
from edge_agent.outbox.rows import Bounds, Kind, Loss, Losses, NewRow, Row, Tally, keep_within

# Chosen: a disk that was full or unplugged is asked again so often.
RETRY_S = 30.0
# Chosen: what an agent without a disk may hold of each kind; with all four well below a megabyte.
MEMORY_MAX_ROWS, MEMORY_MAX_BYTES = 500, 192 << 10
# Chosen: incidents that nobody asked for; the newest count.
_MAX_INCIDENTS = 16

_log = logging.getLogger(__name__)


class Trouble(StrEnum):
    FULL = "full"
    READ_ONLY = "read_only"
    FAULTY = "faulty"
    """Input and output fail."""
    CORRUPT = "corrupt"


class Incident(NamedTuple):
    """Something that an operator wants to know; `detail` is a sentence."""

    action: str
    detail: str


@dataclass(frozen=True, slots=True)
class Figures:
    """How it stands at one moment; `trouble` None: on disk, all is well."""

    tallies: Mapping[Kind, Tally]
    losses: Mapping[tuple[Kind, Loss], int]
    trouble: Trouble | None
    now_s: float


class StorageLimits(NamedTuple):
    bounds: dict[Kind, Bounds]
    max_bytes: int
    min_free_bytes: int


def free_bytes(folder: Path) -> int:
    """Return what a user may still write to the disk of `folder`."""
    figures = os.statvfs(folder)
    return figures.f_bavail * figures.f_frsize


class Storage:
    """Nothing is opened before `open`."""

    def __init__(
        self,
        path: Path,
        limits: StorageLimits,
        *,
        clock: Clock,
        boot: Boot,
        connect: Connect = connect,
        free_bytes: Callable[[Path], int] = free_bytes,
    ) -> None:
        self._path = path
        self._limits = limits
        self._clock = clock
        self._boot = boot
        self._connect = connect
        self._free_bytes = free_bytes
        self._database: Database | None = None
        self._ring = Ring()
        # On disk, sent, and not yet to be removed there.
        self._sent: set[int] = set()
        self._trouble: Trouble | None = None
        self._retry_at_s = 0.0
        self._losses: Losses = {}
        self._incidents: list[Incident] = []
        self.age = AgeClock(None, clock=clock, boot=boot)

    def open(self) -> None:
        self._try(self._reopen)

    def close(self) -> None:
        """Write down what can be; what is in memory only is lost with the process."""
        self._try(self._recover)
        for kind in Kind:
            self._lose(kind, Loss.MEMORY, self._ring.tally(kind).rows)
        self._shut()

    def add(self, rows: list[NewRow]) -> None:
        if self._trouble is not None and self._clock.monotonic_s() >= self._retry_at_s:
            self._try(self._recover)
        if self._trouble is not None or not self._try(lambda: self._write(rows)):
            self._ring.add(rows)
        self._shed()

    def oldest(self, kind: Kind, *, limit: int, max_bytes: int) -> list[Row]:
        """Return the first rows of a kind that were not sent, in order."""
        found: list[Row] = []
        if self._database is not None:
            self._try(lambda: found.extend(self._on_disk(kind, limit, max_bytes)))
        return found or self._ring.oldest(kind, limit=limit, max_bytes=max_bytes)

    def remove(self, numbers: list[int]) -> None:
        """Forget rows that have left, or never will."""
        self._ring.remove([number for number in numbers if number >= FIRST_NUMBER])
        self._sent.update(number for number in numbers if number < FIRST_NUMBER)
        if self._trouble is None:
            self._try(self._remove_sent)

    def lose(self, kind: Kind, why: Loss, rows: int) -> None:
        """Count rows that were lost before they came here, or are about to be removed."""
        self._lose(kind, why, rows)

    def look_after(self) -> None:
        """Do what time asks for: shed what is too old, try the disk again, write the axis of ages down."""
        if self._trouble is not None and self._clock.monotonic_s() >= self._retry_at_s:
            self._try(self._recover)
        self._shed()
        if self._trouble is None:
            self._try(self._save)

    def figures(self) -> Figures:
        return Figures({kind: self._tally(kind) for kind in Kind}, dict(self._losses), self._trouble, self.age.now_s())

    def taken_incidents(self) -> list[Incident]:
        taken, self._incidents = self._incidents, []
        return taken

    # ---- what may fail -----------------------------------------------------------------------------------------

    def _try(self, act: Callable[[], object]) -> bool:
        """Do something on the disk; when it fails, sort out what that means and say False."""
        try:
            act()
        except (sqlite3.Error, OSError) as error:
            self._note(trouble_of(error), str(error))
            return False
        return True

    def _reopen(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._database = Database(self._path, max_bytes=self._limits.max_bytes, connect=self._connect)
        self.age = AgeClock(self._later(self._database.anchor()), clock=self._clock, boot=self._boot)
        # Not every disk that lets a file be opened lets it be written. It stays open: what is there can be sent.
        self._database.save_anchor(self.age.anchor())

    def _later(self, kept: Anchor | None) -> Anchor:
        """Return the anchor that is further on: after a while in memory that is our own."""
        own = self.age.anchor()
        return own if kept is None or kept.age_s < own.age_s else kept

    def _write(self, rows: list[NewRow]) -> None:
        assert self._database is not None
        self._require_room()
        self._database.add(rows, self.age.anchor())

    def _require_room(self) -> None:
        free = self._free_bytes(self._path.parent)
        if free < self._limits.min_free_bytes:
            raise OSError(errno.ENOSPC, f"expected {self._limits.min_free_bytes} free bytes, got {free}")

    def _recover(self) -> None:
        """Go back to the disk, with what came meanwhile."""
        if self._trouble is None:
            return
        self._retry_at_s = self._clock.monotonic_s() + RETRY_S
        if self._database is None:
            self._reopen()
        self._require_room()
        self._remove_sent()
        assert self._database is not None
        waiting = self._ring.taken()
        try:
            self._database.add(waiting, self.age.anchor())
        except BaseException:
            self._ring.add(waiting)
            raise
        was, self._trouble = self._trouble, None
        self._tell("outbox.recovered", f"the disk takes rows again (it was {was.value}); {len(waiting)} were in memory")

    def _on_disk(self, kind: Kind, limit: int, max_bytes: int) -> list[Row]:
        assert self._database is not None
        rows = self._database.oldest(kind, limit=limit + len(self._sent), max_bytes=max_bytes)
        if self._sent and all(row.number in self._sent for row in rows):
            # Some hundreds at most: whatever the disk does not let go.
            rows = self._database.oldest(kind, limit=limit + len(self._sent), max_bytes=self._limits.max_bytes)
        return [row for row in rows if row.number not in self._sent][:limit]

    def _remove_sent(self) -> None:
        if self._database is not None and self._sent:
            self._database.remove(sorted(self._sent))
            self._database.give_back()
            self._sent.clear()

    def _save(self) -> None:
        if self._database is not None:
            self._database.save_anchor(self.age.anchor())
            self._database.give_back()

    # ---- what comes of it --------------------------------------------------------------------------------------

    def _note(self, trouble: Trouble, reason: str) -> None:
        if trouble is Trouble.CORRUPT:
            self._set_aside(reason)
            return
        self._retry_at_s = self._clock.monotonic_s() + RETRY_S
        if trouble is not self._trouble:
            self._tell(f"outbox.{trouble.value}", f"rows are kept in memory only, and few: {reason}"[:256])
        self._trouble = trouble

    def _set_aside(self, reason: str) -> None:
        """Begin anew; the damaged file stays for whoever wants to look, the one before it goes."""
        for kind in Kind:
            known = 0 if self._database is None else self._database.tally(kind).rows
            self._lose(kind, Loss.CORRUPT, known)
        self._shut()
        self._sent.clear()
        self._tell("outbox.corrupt", f"the queue was damaged and is begun anew: {reason}"[:256])
        # Until it is done: what fails from here on is the disk's fault, not the file's.
        self._trouble, self._retry_at_s = Trouble.FAULTY, self._clock.monotonic_s() + RETRY_S
        try:
            set_aside(self._path, at_s=int(self._clock.now().timestamp()))
            self._reopen()
        except (sqlite3.Error, OSError) as error:
            _log.warning("the outbox could not be begun anew", extra={"reason": str(error)})
        else:
            self._trouble = None

    def _shut(self) -> None:
        if self._database is not None:
            database, self._database = self._database, None
            try:
                database.close()
            except sqlite3.Error as error:
                _log.warning("the outbox did not close cleanly", extra={"reason": str(error)})

    def _shed(self) -> None:
        now_s = self.age.now_s()
        small = {
            kind: Bounds(min(bound.max_rows, MEMORY_MAX_ROWS), min(bound.max_bytes, MEMORY_MAX_BYTES), bound.max_age_s)
            for kind, bound in self._limits.bounds.items()
        }
        lost = keep_within(self._ring, small, max_bytes=len(Kind) * MEMORY_MAX_BYTES, now_s=now_s)
        for (kind, why), rows in lost.items():
            self._lose(kind, why if why is Loss.AGE else Loss.MEMORY, rows)
        if self._database is not None and self._trouble is None:
            self._try(lambda: self._shed_on_disk(now_s))

    def _shed_on_disk(self, now_s: float) -> None:
        assert self._database is not None
        lost = keep_within(self._database, self._limits.bounds, max_bytes=self._limits.max_bytes, now_s=now_s)
        for (kind, why), rows in lost.items():
            self._lose(kind, why, rows)

    def _lose(self, kind: Kind, why: Loss, rows: int) -> None:
        if rows:
            self._losses[kind, why] = self._losses.get((kind, why), 0) + rows

    def _tally(self, kind: Kind) -> Tally:
        disk = Tally() if self._database is None else self._database.tally(kind)
        memory = self._ring.tally(kind)
        oldest_s = memory.oldest_s if disk.oldest_s is None else disk.oldest_s
        return Tally(disk.rows + memory.rows, disk.size_bytes + memory.size_bytes, oldest_s)

    def _tell(self, action: str, detail: str) -> None:
        level = logging.INFO if action == "outbox.recovered" else logging.WARNING
        _log.log(level, "the outbox's storage changed", extra={"what": action, "detail": detail})
        self._incidents = [*self._incidents, Incident(action, detail)][-_MAX_INCIDENTS:]


def trouble_of(error: sqlite3.Error | OSError) -> Trouble:
    """Return what a failure of the disk or of SQLite stands for (sqlite.org/rescode.html; the low byte is primary)."""
    if isinstance(error, OSError):
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return Trouble.FULL
        return Trouble.READ_ONLY if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM} else Trouble.FAULTY
    code: int | None = getattr(error, "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_IOERR_LOCK:
        # A file that may not be written cannot be locked for writing either.
        return Trouble.READ_ONLY
    match None if code is None else code & 0xFF:
        case sqlite3.SQLITE_FULL:
            return Trouble.FULL
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return Trouble.READ_ONLY
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return Trouble.CORRUPT
        case None if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            # `Unusable`, and what the module finds wrong by itself.
            return Trouble.CORRUPT
        case _:
            return Trouble.FAULTY


def set_aside(path: Path, *, at_s: int) -> Path:
    """Rename a damaged database and what belongs to it, in place of an older one; return where it is."""
    for older in path.parent.glob(f"{path.stem}.corrupt-*"):
        older.unlink()
    target = path.with_name(f"{path.stem}.corrupt-{at_s}")
    path.replace(target)
    for suffix in ("-wal", "-shm"):
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.replace(target.with_name(target.name + suffix))
    return target
