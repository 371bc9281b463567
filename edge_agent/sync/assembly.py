"""One file of a variant while it is put together from its chunks, under `partial/`.

The room of the whole file is taken at once, and chunks are written where they belong, in any order. No journal says
which are here: after a restart every chunk is read and hashed. A journal could only be believed after a power cut if it
were made durable after every chunk: fdatasync of 1 MiB and of a line in a journal took 2 to 13 ms (measured on a busy
virtual machine, ext4), hashing 1 MiB 0.1 ms. Hashing is right whatever the disk did or did not keep, and skips what
was never written.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from core.chunks import ChunkRef, chunk_digest
from core.errors import DiskFull, Unavailable
from core.manifest import File
from edge_agent.sync.chunk_writer import ChunkWriter

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Assembly:
    """Methods block on the disk; one thread calls them. `chunks` are those of `file`, in order."""

    def __init__(self, path: Path, file: File, chunks: Sequence[ChunkRef]) -> None:
        self.file = file
        self._path = path
        self.chunks = tuple(chunks)
        self._missing = {ref.index: ref for ref in self.chunks}
        self.stored_bytes = 0
        # Otherwise chunks of an earlier process may be here.
        self.is_new = not path.exists()

    @property
    def missing(self) -> tuple[ChunkRef, ...]:
        return tuple(self._missing.values())

    @property
    def unallocated_bytes(self) -> int:
        """Return how much room on the disk the rest of the file will take."""
        try:
            # POSIX counts blocks of 512 bytes.
            return max(self.file.size_bytes - self._path.stat().st_blocks * 512, 0)
        except FileNotFoundError:
            return self.file.size_bytes

    def allocate(self) -> None:
        """Take the room of the whole file.

        Raises:
            DiskFull: there is less than that.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if self.file.size_bytes:
                os.posix_fallocate(descriptor, 0, self.file.size_bytes)
            os.ftruncate(descriptor, self.file.size_bytes)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(descriptor)

    def recheck(self, ref: ChunkRef) -> None:
        """Count a chunk that an earlier process left here, if it is whole."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            if ref.index in self._missing and _has_data(descriptor, ref) and _is_intact(descriptor, ref):
                self._count(ref)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(descriptor)

    def write(
        self, ref: ChunkRef, content: bytes | memoryview, writer: ChunkWriter, on_safe: Callable[[], object]
    ) -> None:
        """Put the bytes of chunk `ref`, which are verified, where it belongs, unless it is there; see ChunkWriter."""
        if ref.index not in self._missing:
            on_safe()
            return
        try:
            writer.write(self._path, content, ref.offset, on_safe)
        except OSError as error:
            raise self._failure(error) from error
        self._count(ref)

    def _count(self, ref: ChunkRef) -> None:
        del self._missing[ref.index]
        self.stored_bytes += ref.size_bytes

    def _failure(self, error: OSError) -> DiskFull | Unavailable:
        if error.errno in _NO_ROOM:
            return DiskFull(
                f"disk full: {self.file.path} needs {self.file.size_bytes} bytes ({error.strerror}); free some space"
            )
        return Unavailable(f"disk: {error.strerror or error}")


def _is_intact(descriptor: int, ref: ChunkRef) -> bool:
    return chunk_digest(os.pread(descriptor, ref.size_bytes, ref.offset)) == ref.digest


def _has_data(descriptor: int, ref: ChunkRef) -> bool:
    """Say whether anything was ever written within a chunk; where nothing was there is no need to read."""
    try:
        return os.lseek(descriptor, ref.offset, os.SEEK_DATA) < ref.offset + ref.size_bytes
    except OSError as error:
        if error.errno == errno.ENXIO:  # Past the last of it.
            return False
        raise
