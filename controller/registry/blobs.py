"""Content-addressed bytes on disk: `<root>/sha256/ab/<64 hexadecimal digits>`, each file exactly what its name says.

A blob arrives in a temporary file under `<root>/tmp`, is hashed on the way, made durable, and only then renamed to its
name: a name that exists is whole and true, whatever was interrupted. Two uploads of one digest write two temporaries,
and the second rename replaces the first file by the same bytes. Blobs are read-only and never deleted here.

File work happens on a few threads of the store's own, so that a slow disk never stops the event loop.
"""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from core.atomic_files import publish_file
from core.digest import Digest, Hasher, digest_of_file, hex_of, parse_digest
from core.errors import NotFound, TooLarge, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

# Bytes moved per hop to a thread: a hop costs some 50 us, writing 1 MiB about ten times that.
BLOCK_BYTES = 1 << 20
_THREADS = 4


class BlobStore:
    """The blobs under `root`. Call `prepare` once before use and `close` at the end."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "sha256"
        self._temporaries = root / "tmp"
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")

    async def prepare(self) -> None:
        """Make the folders, and remove what an interrupted process left half written."""
        await self._in_thread(self._prepare)

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    def path(self, digest: Digest) -> Path:
        """Return where the blob stands, whether or not it is there; never outside the store."""
        name = hex_of(parse_digest(digest))
        return self._blobs / name[:2] / name

    async def has(self, digest: Digest) -> bool:
        return await self._in_thread(self.path(digest).is_file)

    async def size(self, digest: Digest) -> int:
        """Return the bytes of a blob.

        Raises:
            NotFound: there is no such blob.
        """
        try:
            return (await self._in_thread(self.path(digest).stat)).st_size
        except FileNotFoundError as error:
            raise _no_blob(digest) from error

    async def put_stream(self, digest: Digest, blocks: AsyncIterator[bytes], *, max_bytes: int) -> bool:
        """Store the bytes of `blocks` under `digest`; return whether they are new here.

        Nothing remains when it raises or is cancelled.

        Raises:
            TooLarge: more than `max_bytes` came.
            IntegrityError: the bytes have another digest.
            Unavailable: the disk is full or fails otherwise.
        """
        target = self.path(digest)
        async with self.scratch() as folder:
            temporary = folder / "upload"
            file = await self._in_thread(temporary.open, "wb")
            try:
                hasher = await self._receive(blocks, file, max_bytes)
            finally:
                # In a thread and shielded: closing writes what is buffered, and a full disk fails it.
                await asyncio.shield(self._in_thread(file.close))
            hasher.require(digest)
            return await self._in_thread(_publish, temporary, target)

    async def put_file(self, source: Path) -> Digest:
        """Take over the finished file `source`, which must be in a `scratch` folder; return its digest."""
        digest = await self._in_thread(digest_of_file, source)
        await self._in_thread(_publish, source, self.path(digest))
        return digest

    async def put_bytes(self, content: bytes) -> Digest:
        async with self.scratch() as folder:
            source = folder / "content"
            await self._in_thread(source.write_bytes, content)
            return await self.put_file(source)

    async def open_range(self, digest: Digest, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a blob from `offset` to its end, in blocks of at most 1 MiB.

        Close the iterator (`contextlib.aclosing`) when leaving it early.

        Raises:
            NotFound: there is no such blob.
        """
        try:
            file = await self._in_thread(self.path(digest).open, "rb")
        except FileNotFoundError as error:
            raise _no_blob(digest) from error
        with file:
            file.seek(offset)
            while block := await self._in_thread(file.read, BLOCK_BYTES):
                yield block

    async def copy(self, digest: Digest, target: Path) -> None:
        """Copy the blob to `target`, in a `scratch` folder.

        A link would be free, but ONNX refuses external data that has several names, and what opens untrusted files
        should not hold the store's own.

        Raises:
            NotFound: there is no such blob.
        """
        try:
            await self._in_thread(_copy, self.path(digest), target)
        except FileNotFoundError as error:
            raise _no_blob(digest) from error

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """Lend a new folder on the store's file system; it is gone afterwards, and after a crash at the next start."""
        folder = Path(await self._in_thread(tempfile.mkdtemp, dir=self._temporaries))
        try:
            yield folder
        finally:
            # Shielded: a caller that is cancelled again while waiting must not leave the folder behind.
            await asyncio.shield(self._in_thread(shutil.rmtree, folder, ignore_errors=True))

    async def _receive(self, blocks: AsyncIterator[bytes], file: IO[bytes], max_bytes: int) -> Hasher:
        """Write `blocks` to `file`, gathered so that each hop to a thread is worth it."""
        hasher = Hasher()
        gathered = bytearray()
        async for block in blocks:
            if hasher.size_bytes + len(gathered) + len(block) > max_bytes:
                raise TooLarge(f"blob: expected at most {max_bytes} bytes, got more; raise registry.max_model_bytes")
            gathered += block
            if len(gathered) >= BLOCK_BYTES:
                await self._in_thread(_append, file, hasher, bytes(gathered))
                gathered.clear()
        await self._in_thread(_append, file, hasher, bytes(gathered))
        return hasher

    async def _in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call` on a thread of the store.

        Raises:
            FileNotFoundError: as `call` raised it; what it means is the caller's to say.
            Unavailable: the disk is full or fails otherwise.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Unavailable(f"disk: {error.strerror or error}; free some space and try again") from error

    def _prepare(self) -> None:
        self._blobs.mkdir(parents=True, exist_ok=True)
        if self._temporaries.exists():
            shutil.rmtree(self._temporaries)
        self._temporaries.mkdir()


def _append(file: IO[bytes], hasher: Hasher, block: bytes) -> None:
    file.write(block)
    hasher.update(block)


def _publish(temporary: Path, target: Path) -> bool:
    is_new = not target.exists()
    temporary.chmod(0o444)
    publish_file(temporary, target)
    return is_new


def _copy(blob: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(blob, target)


def _no_blob(digest: Digest) -> NotFound:
    return NotFound(f"blob {digest}: not here; upload it first")
