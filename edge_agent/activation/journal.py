"""The record of activation on disk: two files written in turn, so that one of them is whole at any instant.

    journal.0, journal.1    each a checksummed record with a sequence number; the newest that is whole counts

A write that fails or is cut off harms only the older file. When both are broken or missing the journal is lost: the
record is empty until `rebuild` makes one of what the store proves.

Methods that write block on the disk; the owner calls them from one thread. `record` may be read anywhere.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from core.atomic_files import sync_folder
from core.clock import Clock
from core.digest import Digest
from core.errors import NanofleetError
from core.fleet_state import DesiredState
from core.ids import ModelName
from edge_agent.activation.record import Quarantine, Record, decode_record, encode_record

# Derived: two states of 256 slots, as many trials and 64 quarantined variants stay below a quarter of it.
MAX_JOURNAL_BYTES = 4 << 20

_log = logging.getLogger(__name__)


class Journal:
    def __init__(self, folder: Path, *, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._files = (folder / "journal.0", folder / "journal.1")
        self._make_folder()
        self.is_lost = False
        # What the record names since it was rebuilt: whether that failed here before is forgotten.
        self.unproven: frozenset[Digest] = frozenset()
        self._sequence, self._record = self._load()

    @property
    def record(self) -> Record:
        """What is durable now."""
        return self._record

    def update(self, change: Callable[[Record], Record]) -> Record:
        """Make what `change` makes of the record the one that counts; durable on return.

        Raises:
            OSError: the disk did not take it; the record before counts, now and after a restart.
        """
        record = change(self._record)
        if record != self._record:
            sequence = self._sequence + 1
            self._write(self._files[sequence % 2], encode_record(record, sequence=sequence))
            self._sequence, self._record = sequence, record
        return record

    def rebuild(self, record: Record) -> None:
        """Make `record` the one that counts, in place of the one that was lost."""
        self.update(lambda _: record)
        self.is_lost = False
        self.unproven = record.in_use()

    def reset(self) -> None:
        """Forget everything, durably: no older file comes back when the new one breaks."""
        self._sequence, self._record = self._sequence + 1, Record()
        fresh, stale = self._files[self._sequence % 2], self._files[(self._sequence + 1) % 2]
        self._write(fresh, encode_record(self._record, sequence=self._sequence))
        stale.unlink(missing_ok=True)
        sync_folder(self._folder)

    def save_active(self, state: DesiredState) -> None:
        """Remember `state` as the one in force, and the one it follows as the previous."""
        self.update(lambda record: record.in_force(state))

    def note_start(self, *, software_version: str) -> Record:
        """Note that a process starts; return the record, with trials over that crashed too often.

        Quarantine by another version of the software ends here: what failed then may work now.
        """
        before = self._record
        now = self._clock.now()
        self.update(lambda record: record.started(software_version=software_version, now=now))
        if before.is_running:
            _log.warning("the agent did not stop properly the last time", extra={"trials": len(before.trials)})
        for entry in self._record.quarantine:
            if before.quarantined(entry.slot.manifest_digest) is None:
                _log.error("rolled back at start", extra={"model": entry.slot.model, "why": entry.problem.message})
        return self._record

    def note_clean_stop(self) -> None:
        """Note that the process ends because it was told to."""
        self.update(lambda record: record.stopped())

    def release(self, model: ModelName) -> tuple[Quarantine, ...]:
        """Let everything of `model` that is in quarantine be tried again, and return what was."""
        entries = tuple(entry for entry in self._record.quarantine if entry.slot.model == model)
        self.update(lambda record: record.released(entries))
        return entries

    def _make_folder(self) -> None:
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self._folder.parent)

    def _load(self) -> tuple[int, Record]:
        found = [whole for path in self._files if (whole := _read(path)) is not None]
        if not found and any(path.exists() for path in self._files):
            _log.error("both files of the journal are unreadable")
        self.is_lost = not found
        return max(found, key=lambda whole: whole[0], default=(0, Record()))

    def _write(self, path: Path, content: bytes) -> None:
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        if is_new:
            sync_folder(self._folder)


def _read(path: Path) -> tuple[int, Record] | None:
    try:
        with path.open("rb") as file:
            return decode_record(file.read(MAX_JOURNAL_BYTES))
    except FileNotFoundError:
        return None
    except (NanofleetError, OSError) as error:
        _log.warning("a file of the journal is unreadable", extra={"file": path.name, "reason": str(error)})
        return None
