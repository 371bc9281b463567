"""One file of the spool: records behind each other, each with a head that can be found again behind damage.

    magic │ state │ length │ spans │ time │ CRC of the payload │ CRC of the head but its state │ payload

A record that was dealt with is marked by overwriting its one byte of state in place: that is whole or not there,
whenever the process dies, and needs no second file. Behind a head that does not hold the next magic is looked for, a
payload that does not hold is skipped by its length: damage costs the record that it hit.
"""

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MAGIC = b"nfs\x01"
_HEAD = struct.Struct(">4sBIIdI")
_CHECK = struct.Struct(">I")
HEAD_BYTES = _HEAD.size + _CHECK.size
_STATE_AT = len(MAGIC)
_WAITING, _DONE = 0, 1

Write = Callable[[int, bytes], int]


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of a record without its payload; `at_s` is seconds since the epoch."""

    length: int
    spans: int
    at_s: float
    checksum: int
    is_done: bool = False

    @classmethod
    def of(cls, payload: bytes, *, spans: int, at_s: float) -> Self:
        return cls(len(payload), spans, at_s, zlib.crc32(payload))

    def to_bytes(self) -> bytes:
        state = _DONE if self.is_done else _WAITING
        head = _HEAD.pack(MAGIC, state, self.length, self.spans, self.at_s, self.checksum)
        return head + _CHECK.pack(_checksum(head))

    @classmethod
    def parse(cls, head: bytes) -> Self | None:
        """Return the head in the first HEAD_BYTES of `head`; None: it is not one."""
        if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
            return None
        if _CHECK.unpack_from(head, _HEAD.size)[0] != _checksum(head[: _HEAD.size]):
            return None
        _, state, length, spans, at_s, checksum = _HEAD.unpack_from(head)
        return cls(length, spans, at_s, checksum, is_done=state == _DONE)


@dataclass(frozen=True, slots=True)
class Found:
    """A record as it stands in a segment; `payload` None: it is damaged."""

    offset: int
    head: Head
    payload: bytes | None

    @property
    def end(self) -> int:
        return self.offset + HEAD_BYTES + self.head.length


class Segment:
    """A file of records, open for as long as it is here. `size` is where the next record goes."""

    def __init__(self, path: Path, *, number: int, write: Write = os.write) -> None:
        self.path = path
        self.number = number
        # What waits in it, from `read_at` on.
        self.waiting_spans = 0
        self.waiting_bytes = 0
        self.newest_s = 0.0
        self.read_at = 0
        self._write = write
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self._file).st_size

    def count(self) -> None:
        """Find out what waits in a file that an earlier process left, by reading it once."""
        offset = 0
        while (found := self.find(offset)) is not None:
            if not found.head.is_done:
                self._note(found.head)
            offset = found.end

    def append(self, payload: bytes, *, spans: int, at_s: float) -> None:
        """Add a record.

        Raises:
            OSError: it could not be written; the file is as it was before, as far as it can be cut.
        """
        head = Head.of(payload, spans=spans, at_s=at_s)
        rest = memoryview(head.to_bytes() + payload)
        os.lseek(self._file, self.size, os.SEEK_SET)
        try:
            while rest:
                rest = rest[self._write(self._file, bytes(rest)) :]
        except OSError:
            os.ftruncate(self._file, self.size)
            raise
        self.size += HEAD_BYTES + len(payload)
        self._note(head)

    def find(self, offset: int) -> Found | None:
        """Return the first record at or behind `offset`; None: there is none."""
        if offset >= self.size:
            return None
        head = Head.parse(os.pread(self._file, HEAD_BYTES, offset))
        if head is None or offset + HEAD_BYTES + head.length > self.size:
            return self._search(offset)
        payload = os.pread(self._file, head.length, offset + HEAD_BYTES)
        is_whole = len(payload) == head.length and zlib.crc32(payload) == head.checksum
        return Found(offset, head, payload if is_whole else None)

    def pass_by(self, found: Found) -> None:
        """Read on behind `found`, which no longer waits."""
        self.read_at = found.end
        if not found.head.is_done:
            self.waiting_spans = max(0, self.waiting_spans - found.head.spans)
            self.waiting_bytes = max(0, self.waiting_bytes - found.head.length)

    def mark_done(self, offset: int) -> None:
        """Mark the record at `offset` as dealt with: the next process does not send it again."""
        if offset < self.size:
            os.pwrite(self._file, bytes([_DONE]), offset + _STATE_AT)

    def empty(self) -> None:
        """Forget every record, of which none waits."""
        os.ftruncate(self._file, 0)
        self.size = self.read_at = self.waiting_spans = self.waiting_bytes = 0

    def close(self) -> None:
        os.close(self._file)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def sync(self) -> None:
        os.fdatasync(self._file)

    def _note(self, head: Head) -> None:
        self.waiting_spans += head.spans
        self.waiting_bytes += head.length
        self.newest_s = max(self.newest_s, head.at_s)

    def _search(self, offset: int) -> Found | None:
        """Return the first whole record behind the damage at `offset`."""
        rest = os.pread(self._file, self.size - offset, offset)
        at = 0
        while (at := rest.find(MAGIC, at + 1)) >= 0:
            head = Head.parse(rest[at : at + HEAD_BYTES])
            if head is not None and offset + at + HEAD_BYTES + head.length <= self.size:
                return self.find(offset + at)
        return None


def _checksum(head: bytes) -> int:
    return zlib.crc32(head[:_STATE_AT] + head[_STATE_AT + 1 :])
