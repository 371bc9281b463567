"""One file of a variant while it is put together from its chunks, under `partial/`.

The room of the whole file is taken at once, and chunks are written where they belong, in any order. No journal says
which are here: after a restart every chunk is read and hashed. A journal could only be believed after a power cut if it
were made durable after every chunk, which costs a write to the disk each (some 2 to 10 ms, against 0.6 ms for hashing
1 MiB, measured in benchmarks/fetch.py); hashing is right whatever the disk did or did not keep, and skips what was
never written. Unverified bytes may therefore stand in the file, and do no harm.

While chunks come in order the digest of the whole file grows with them, so that the end needs no second reading.
"""

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from core.chunks import ChunkRef
from core.digest import Digest, Hasher
from core.errors import DiskFull, InvalidManifest, Unavailable
from core.manifest import File

_READ_BYTES = 1 << 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Assembly:
    """Methods block on the disk; one thread calls them. `chunks` are those of `file`, in order."""

    def __init__(self, path: Path, file: File, chunks: Sequence[ChunkRef]) -> None:
        self.file = file
        self._path = path
        self.chunks = tuple(chunks)
        self._missing = {ref.index: ref for ref in self.chunks}
        self._hasher = Hasher()
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

    def recheck(self, ref: ChunkRef) -> bool:
        """Say whether an earlier process left this chunk here, whole."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            if not _has_data(descriptor, ref):
                return False
            return self.accept(ref, os.pread(descriptor, ref.size_bytes, ref.offset))
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(descriptor)

    def write(self, ref: ChunkRef, content: bytes) -> None:
        """Put bytes where chunk `ref` belongs; they count once they are accepted."""
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(descriptor, memoryview(content)[written:], ref.offset + written)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(descriptor)

    def accept(self, ref: ChunkRef, content: bytes) -> bool:
        """Say whether `content`, which stands in the file, is chunk `ref`; from then on it counts as stored."""
        if hashlib.sha256(content).digest() != ref.sha256:
            return False
        if self._missing.pop(ref.index, None) is not None:
            self.stored_bytes += ref.size_bytes
        if ref.offset == self._hasher.size_bytes:
            self._hasher.update(content)
        return True

    def require_whole(self) -> None:
        """Verify the digest of the whole file.

        Raises:
            InvalidManifest: the file's chunks are those of the manifest, yet the file is not.
        """
        with self._path.open("rb") as file:
            file.seek(self._hasher.size_bytes)
            while block := file.read(_READ_BYTES):
                self._hasher.update(block)
        found, expected = self._hasher.digest(), Digest(self.file.digest)
        if found != expected:
            self._path.unlink()
            raise InvalidManifest(f"{self.file.path}: expected {expected}, its chunks make {found}; publish it again")

    def _failure(self, error: OSError) -> DiskFull | Unavailable:
        if error.errno in _NO_ROOM:
            return DiskFull(
                f"disk full: {self.file.path} needs {self.file.size_bytes} bytes ({error.strerror}); free some space"
            )
        return Unavailable(f"disk: {error.strerror or error}")


def _has_data(descriptor: int, ref: ChunkRef) -> bool:
    """Say whether anything was ever written within a chunk; where nothing was there is no need to read."""
    try:
        return os.lseek(descriptor, ref.offset, os.SEEK_DATA) < ref.offset + ref.size_bytes
    except OSError as error:
        if error.errno == errno.ENXIO:  # Past the last of it.
            return False
        raise
