"""Writing verified chunks past the page cache, where the file system allows it.

A model is written once and read much later, if at all: in the page cache it only takes the place of what the machine
is working with. Allocating those pages, copying into them and writing them out took most of the processor time of a
fetch, and several times that where a virtual machine has to ask its host for the memory first (measured:
benchmarks/README.md, fetch). The kernel takes whole blocks straight out of aligned memory instead (open(2), O_DIRECT);
what lies before the first and behind the last whole block of a chunk goes the ordinary way.
"""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

# Chosen: a multiple of every block size in use; a file system that wants larger ones gets ordinary writes.
_BLOCK_BYTES = 4096
_CLOSED = -1


class Disk(Protocol):
    """What the module `os` does."""

    def open(self, path: Path, flags: int, /) -> int: ...

    def pwrite(self, descriptor: int, content: memoryview, offset: int, /) -> int: ...


class ChunkWriter:
    """Keeps one file open at a time, and the aligned memory; methods block, and one thread calls them."""

    def __init__(self, *, room_bytes: int, disk: Disk | None = None) -> None:
        """`room_bytes`: size of the largest chunk."""
        self._room = memoryview(mmap.mmap(-1, max(room_bytes, 1)))
        self._disk: Disk = os if disk is None else disk
        self._path: Path | None = None
        self._plain = self._direct = _CLOSED
        self._is_refused = False

    def close(self) -> None:
        for descriptor in {self._plain, self._direct} - {_CLOSED}:
            os.close(descriptor)
        self._plain = self._direct = _CLOSED
        self._path = None

    def write(self, path: Path, content: bytes | memoryview, offset: int, on_safe: Callable[[], object]) -> None:
        """Write `content` at `offset` of a file that is there.

        `on_safe` is called when it gets there even if this process is killed: for a direct write, which ends once it
        has begun, right before that.

        Raises:
            OSError: the disk is full, or failed.
        """
        if path != self._path:
            self._open(path)
        view = memoryview(content)
        first = min(-offset % _BLOCK_BYTES, len(view))
        last = max(len(view) - (offset + len(view)) % _BLOCK_BYTES, first)
        self._write_all(self._plain, view[:first], offset)
        self._write_all(self._plain, view[last:], offset + last)
        if not self._write_blocks(view[first:last], offset + first, on_safe):
            self._write_all(self._plain, view[first:last], offset + first)
            # Linux begins to write these pages out and does not wait: the fsync at the end has little left to do.
            os.posix_fadvise(self._plain, offset, len(view), os.POSIX_FADV_DONTNEED)
            on_safe()

    def _open(self, path: Path) -> None:
        self.close()
        self._plain = self._disk.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._path = path
        if not self._is_refused:
            try:
                self._direct = self._disk.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                self._refuse(error)

    def _write_blocks(self, blocks: memoryview, offset: int, on_safe: Callable[[], object]) -> bool:
        """Say False when there are none, or the file system does not do this."""
        if self._is_refused or not blocks:
            return False
        self._room[: len(blocks)] = blocks
        on_safe()
        try:
            self._write_all(self._direct, self._room[: len(blocks)], offset)
        except OSError as error:
            self._refuse(error)
        return not self._is_refused

    def _refuse(self, error: OSError) -> None:
        """Do without direct writes from now on, if `error` says that they are not possible."""
        if error.errno != errno.EINVAL:
            raise error
        self._is_refused = True
        if self._direct != _CLOSED:
            os.close(self._direct)
            self._direct = _CLOSED

    def _write_all(self, descriptor: int, content: memoryview, offset: int) -> None:
        written = 0
        while written < len(content):
            written += self._disk.pwrite(descriptor, content[written:], offset + written)
