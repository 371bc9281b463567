"""`Spool`: what waits for the collector, on disk: in order, bounded in bytes and age, whole after any death.

    append ─▶ newest segment … oldest segment ─▶ take ─▶ (send) ─▶ done

What was appended is in the page cache when `append` returns, and so outlives the process; a power cut may cost what
came after the last `sync`. Over the bound the oldest segment goes as a whole. What was taken is out until it is `done`:
`take` gives the same records till then, also after a restart. Blocking, for one thread.
"""

import contextlib
import logging
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.traces.segment import HEAD_BYTES, Found, Segment, Write

_log = logging.getLogger(__name__)

# Chosen: of the bound an eighth at most goes at once when the oldest is shed, and each segment is an open file.
MIN_SEGMENTS, MAX_SEGMENTS = 8, 256
SEGMENT_BYTES = 4 << 20
_NAME = re.compile(r"([0-9]{12})\.spool")


@dataclass(frozen=True, slots=True)
class SpoolBounds:
    """`max_bytes` of all files together; `max_age_s` of a record, by the wall clock."""

    max_bytes: int
    max_age_s: float

    @property
    def segment_bytes(self) -> int:
        return max(1, min(self.max_bytes // MIN_SEGMENTS, max(SEGMENT_BYTES, self.max_bytes // MAX_SEGMENTS)))


@dataclass(frozen=True, slots=True)
class Taken:
    """A record that was taken out to be sent; `at_s` is when it came, in seconds since the epoch."""

    payload: bytes
    spans: int
    at_s: float
    segment: int
    offset: int


class Spool:
    """Opened by its constructor.

    Raises:
        OSError: the folder cannot be made, read or written to.
    """

    def __init__(self, folder: Path, bounds: SpoolBounds, *, write: Write = os.write) -> None:
        self._folder = folder
        self._bounds = bounds
        self._write = write
        self.shed_spans = 0
        # Records that were skipped because their bytes did not hold, as far as they can be counted.
        self.damaged_records = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._segments: deque[Segment] = deque()
        self._next_number = 1
        # Only a segment of this process is written to: none begins behind the torn end of another.
        self._active: Segment | None = None
        # All of one segment, the oldest that there is, or was until it was shed.
        self._out: deque[Taken] = deque()
        self._open_left_behind()

    @property
    def waiting_bytes(self) -> int:
        """Of all records that are not done, without their heads; may be asked from any thread."""
        # Copied in one step, while another thread may add to them.
        out, segments = tuple(self._out), tuple(self._segments)
        return sum(len(taken.payload) for taken in out) + sum(segment.waiting_bytes for segment in segments)

    def append(self, payload: bytes, *, spans: int, now_s: float) -> None:
        """Add a record behind all others; the oldest are shed to make room.

        Raises:
            OSError: it cannot be written; the spool is as before, but for what was shed.
        """
        size_bytes = HEAD_BYTES + len(payload)
        if size_bytes > self._bounds.max_bytes:
            self.shed_spans += spans
            return
        while self._segments and self._size_bytes() + size_bytes > self._bounds.max_bytes:
            self._shed_oldest()
        segment = self._active
        if segment is None or (segment.size and segment.size + size_bytes > self._bounds.segment_bytes):
            segment = self._new_segment()
        segment.append(payload, spans=spans, at_s=now_s)

    def take(self, now_s: float, *, max_bytes: int = 0) -> Sequence[Taken]:
        """Return the oldest records that are whole, not too old and not done, in order; empty: there is none.

        They have `max_bytes` together, or it is one; when some are out already, these.

        Raises:
            OSError: the disk does not even let go of what is done with.
        """
        oldest_s = now_s - self._bounds.max_age_s
        for taken in tuple(self._out):
            if taken.at_s < oldest_s:
                self.shed_spans += taken.spans
                self.done(taken)
        if not self._out:
            self._take_more(oldest_s, max_bytes)
        return tuple(self._out)

    def _take_more(self, oldest_s: float, max_bytes: int) -> None:
        taken_bytes = 0
        while self._segments:
            segment = self._segments[0]
            if segment.newest_s < oldest_s and segment.waiting_spans and not self._out:
                self._shed_oldest()
                continue
            try:
                found = segment.find(segment.read_at)
            except OSError as error:
                _warn_unreadable(segment.path, error)
                self.damaged_records += 1
                self._shed_oldest()
                continue
            if found is None:
                # A segment stays until all that was taken from it is done.
                if self._out or not self._leave(segment):
                    return
                continue
            if self._out and taken_bytes + found.head.length > max_bytes:
                return
            if (taken := self._pick(segment, found, oldest_s)) is not None:
                self._out.append(taken)
                taken_bytes += len(taken.payload)

    def done(self, *taken: Taken) -> None:
        """Note that these records were sent or never can be; they do not come again.

        Raises:
            OSError: it could not be noted, and some come again after a restart.
        """
        for one in taken:
            self._out.remove(one)
        here = {segment.number: segment for segment in self._segments}
        for one in taken:
            if (segment := here.get(one.segment)) is not None:
                segment.mark_done(one.offset)

    def sync(self) -> None:
        """Make what was appended and still waits safe from a power cut."""
        if self._active is not None and self._active.waiting_spans:
            self._active.sync()

    def close(self) -> None:
        for segment in self._segments:
            is_over = segment.read_at >= segment.size
            if is_over and all(taken.segment != segment.number for taken in self._out):
                segment.remove()
            else:
                segment.close()
        self._segments.clear()
        self._active = None

    def _open_left_behind(self) -> None:
        names = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()]
        numbers = sorted([int(name[1]) for name in names if name is not None])
        for number in numbers:
            self._next_number = number + 1
            try:
                segment = Segment(self._path(number), number=number, write=self._write)
            except OSError as error:
                _warn_unreadable(self._path(number), error)
                continue
            try:
                segment.count()
            except OSError as error:
                segment.close()
                _warn_unreadable(self._path(number), error)
                continue
            self._segments.append(segment)
        while self._segments and self._size_bytes() > self._bounds.max_bytes:
            self._shed_oldest()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:012}.spool"

    def _new_segment(self) -> Segment:
        segment = Segment(self._path(self._next_number), number=self._next_number, write=self._write)
        self._next_number += 1
        if self._active is not None:
            with contextlib.suppress(OSError):
                self._active.sync()
        self._segments.append(segment)
        self._active = segment
        return segment

    def _size_bytes(self) -> int:
        return sum(segment.size for segment in self._segments)

    def _shed_oldest(self) -> None:
        segment = self._segments.popleft()
        if segment is self._active:
            self._active = None
        self.shed_spans += segment.waiting_spans
        segment.remove()

    def _leave(self, segment: Segment) -> bool:
        """Let go of a segment that has been read to its end; False: it is the one that is written to."""
        if segment.read_at < segment.size:
            # Damage with nothing behind it.
            self.damaged_records += 1
        if segment is self._active:
            segment.empty()
            return False
        self._segments.popleft()
        segment.remove()
        return True

    def _pick(self, segment: Segment, found: Found, oldest_s: float) -> Taken | None:
        """Move on to `found`, and take it if it is worth it."""
        if found.offset > segment.read_at or found.payload is None:
            self.damaged_records += 1
        segment.pass_by(found)
        if found.head.is_done or found.payload is None:
            return None
        if found.head.at_s < oldest_s:
            self.shed_spans += found.head.spans
            return None
        return Taken(found.payload, found.head.spans, found.head.at_s, segment.number, found.offset)


def _warn_unreadable(path: Path, error: OSError) -> None:
    _log.warning("a file of the trace spool is unreadable and left out", extra={"path": str(path), "why": str(error)})
