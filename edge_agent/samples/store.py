"""The samples on disk: one file each, whole or not there, bounded in bytes, number and age.

    SAMPLES/1764352000000~digits~7~low_confidence~any~HEX.npz      when, model, class, reason, privacy, digest

The folder is the index: a start reads names, not files. What is wrong is skipped and counted, never an error: a name
that is none of ours, a file that is gone, bytes that have another digest. Everything here waits for the disk; it is
called on one thread, which is the only one that changes the folder (`nanofleet-agent samples purge` may, meanwhile).
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from core.atomic_files import write_atomically
from core.digest import Digest, digest_of, hex_of
from core.errors import DiskFull, IntegrityError, NotFound, TooLarge
from core.ids import NAME_PATTERN
from core.sample_file import SampleView, read_description
from core.samples import MAX_COUNT_ROWS, MAX_SAMPLE_BYTES, SampleCount, SampleCounts

SUFFIX = ".npz"
_NO_LABEL = "none"
_NAME = re.compile(
    rf"(\d{{1,15}})~({NAME_PATTERN.pattern})~(\d{{1,9}}|{_NO_LABEL})~([a-z_]{{1,32}})~(any|site)~([0-9a-f]{{64}})\.npz"
)
# Chosen: names that are remembered, so that each is counted once.
_MAX_SKIPPED = 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_log = logging.getLogger(__name__)


class StoreBounds(NamedTuple):
    max_bytes: int = 64 << 20
    max_samples: int = 2000
    max_age_s: float = 14 * 86_400.0
    # Disk space that is left to others.
    reserve_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class KeptSample:
    """What is known of a sample without reading it."""

    taken_at: datetime
    model: str
    label: int | None
    reason: str
    privacy: str
    digest: Digest
    size_bytes: int

    @property
    def file_name(self) -> str:
        taken_ms = (self.taken_at - _EPOCH) // timedelta(milliseconds=1)
        label = _NO_LABEL if self.label is None else self.label
        return f"{taken_ms}~{self.model}~{label}~{self.reason}~{self.privacy}~{hex_of(self.digest)}{SUFFIX}"


class SampleStore:
    def __init__(self, folder: Path, bounds: StoreBounds = StoreBounds()) -> None:  # noqa: B008 (frozen)
        self._folder = folder
        self._bounds = bounds
        # By age, the oldest first.
        self._kept: dict[Digest, KeptSample] = {}
        self.size_bytes = 0
        # Files that were skipped because they are none of ours or not whole.
        self.damaged = 0
        self._skipped: set[str] = set()
        # Samples that went to make room, or because they were too old.
        self.shed = 0

    def look(self, *, removes_leftovers: bool = True) -> None:
        """Learn what is in the folder now, and remove what an interrupted write left behind.

        `removes_leftovers` False: where another process may be writing.
        """
        self._kept.clear()
        self.size_bytes = 0
        for kept in sorted(self._found(removes_leftovers), key=lambda each: each.taken_at):
            self._note(kept)

    def put(self, view: SampleView, content: bytes, *, now: datetime) -> KeptSample:
        """Keep a sample, and shed the oldest to make room for it.

        Raises:
            TooLarge: it alone is more than may be kept.
            DiskFull: the disk has no room beyond what is reserved.
            OSError: the disk does not take it.
        """
        if len(content) > min(self._bounds.max_bytes, MAX_SAMPLE_BYTES):
            raise TooLarge(f"sample: expected at most {self._bounds.max_bytes} bytes, got {len(content)}")
        kept = KeptSample(
            view.taken_at, view.model, view.label, view.reason, view.privacy, digest_of(content), len(content)
        )
        self._make_room(len(content), now=now)
        self._require_room(len(content))
        write_atomically(self._folder / kept.file_name, content, mode=0o600)
        self._note(kept)
        return kept

    def read(self, kept: KeptSample) -> bytes:
        """Return the bytes of a sample.

        Raises:
            NotFound: it is gone.
            IntegrityError: it is damaged; the file is removed.
        """
        try:
            content = (self._folder / kept.file_name).read_bytes()
        except FileNotFoundError:
            self._forget(kept)
            raise NotFound(f"sample {kept.digest}: is gone") from None
        if digest_of(content) != kept.digest:
            self.damaged += 1
            self.remove(kept.digest)
            raise IntegrityError(f"sample {kept.digest}: its bytes changed on this disk; it was removed")
        return content

    def remove(self, digest: Digest) -> None:
        """Remove a sample, if it is still there."""
        if (kept := self._kept.get(digest)) is not None:
            (self._folder / kept.file_name).unlink(missing_ok=True)
            self._forget(kept)

    def tidy(self, *, now: datetime) -> None:
        """Learn what others removed, and shed what is too old."""
        self.look()
        self._make_room(0, now=now)

    def matching(self, model: str, *, since: datetime | None = None) -> Sequence[KeptSample]:
        """Return the samples of a model, the newest first."""
        found = [each for each in self._kept.values() if each.model == model]
        return [each for each in reversed(found) if since is None or each.taken_at >= since]

    def all(self) -> Sequence[KeptSample]:
        """Return every sample, the oldest first."""
        return tuple(self._kept.values())

    def counts(self) -> SampleCounts:
        """Return how many there are by model, class and reason, the most numerous first."""
        groups = Counter((each.model, each.label, each.reason) for each in self._kept.values())
        rows = [SampleCount(*group, samples) for group, samples in groups.most_common()]
        other = sum(row.samples for row in rows[MAX_COUNT_ROWS:])
        return SampleCounts(tuple(rows[:MAX_COUNT_ROWS]), other, self.size_bytes)

    def purge(self, model: str | None = None) -> int:
        """Remove every sample, or those of one model; return how many there were."""
        purged = [each for each in self._kept.values() if model in (None, each.model)]
        for kept in purged:
            self.remove(kept.digest)
        return len(purged)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _found(self, removes_leftovers: bool) -> Iterator[KeptSample]:
        try:
            entries = sorted(os.scandir(self._folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.name.startswith("."):
                # Of a write that did not come to its end.
                if removes_leftovers:
                    Path(entry.path).unlink(missing_ok=True)
            elif (kept := _kept_of(entry)) is not None:
                yield kept
            elif entry.name not in self._skipped and len(self._skipped) < _MAX_SKIPPED:
                self._skipped.add(entry.name)
                self.damaged += 1

    def _make_room(self, size_bytes: int, *, now: datetime) -> None:
        bounds = self._bounds
        for kept in tuple(self._kept.values()):
            is_old = (now - kept.taken_at).total_seconds() > bounds.max_age_s
            is_many = size_bytes > 0 and len(self._kept) >= bounds.max_samples
            if not is_old and not is_many and self.size_bytes + size_bytes <= bounds.max_bytes:
                break
            self.remove(kept.digest)
            self.shed += 1

    def _require_room(self, size_bytes: int) -> None:
        state = os.statvfs(next(path for path in (self._folder, *self._folder.parents) if path.exists()))
        free_bytes = state.f_bavail * state.f_frsize
        if free_bytes < size_bytes + self._bounds.reserve_bytes:
            raise DiskFull(
                f"samples: {free_bytes} bytes are free, {self._bounds.reserve_bytes} of them reserved; free some"
            )

    def _note(self, kept: KeptSample) -> None:
        # The same bytes twice, which a clock that stands still can make, are one sample.
        self._forget(kept)
        self._kept[kept.digest] = kept
        self.size_bytes += kept.size_bytes

    def _forget(self, kept: KeptSample) -> None:
        if (known := self._kept.pop(kept.digest, None)) is not None:
            self.size_bytes -= known.size_bytes


def description_of(content: bytes, kept: KeptSample) -> SampleView:
    """Return what a sample says it is, which must be what its name says.

    Raises:
        IntegrityError: it is not.
    """
    view = read_description(content)
    if (view.model, view.privacy) != (kept.model, kept.privacy):
        raise IntegrityError(f"sample {kept.digest}: its name says {kept.model} {kept.privacy}, its bytes do not")
    return view


def _kept_of(entry: "os.DirEntry[str]") -> KeptSample | None:
    """Return what a file's name says; None: it is none of ours."""
    match = _NAME.fullmatch(entry.name)
    try:
        if match is None or not entry.is_file(follow_symlinks=False):
            return None
        taken_ms, model, label, reason, privacy, hexadecimal = match.groups()
        return KeptSample(
            _EPOCH + timedelta(milliseconds=int(taken_ms)),
            model,
            None if label == _NO_LABEL else int(label),
            reason,
            privacy,
            Digest(f"sha256:{hexadecimal}"),
            entry.stat(follow_symlinks=False).st_size,
        )
    except (OSError, OverflowError):
        return None
