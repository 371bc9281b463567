"""Building a pack in a child process: its work is numpy and Zstandard on gigabytes, which must not stop the event loop.

The child gets a clean environment and bounds on memory, processor time and file size. However it ends, it is reaped; a
caller that is cancelled kills it. The pack appears under its name whole and durable, or not at all.
"""

import asyncio
import os
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from math import ceil
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from controller.transfer.child import MAX_REPLY_BYTES, ORDER, REPLY, Limits, Order, Side
from controller.transfer.packs import PackId
from core.atomic_files import publish_file
from core.digest import Digest
from core.errors import NotFound, Unavailable
from core.manifest import Manifest

_MODULE = "controller.transfer.child"
# Where the dynamic linker finds the libraries that the parent found; the only thing inherited.
_INHERITED = ("LD_LIBRARY_PATH",)
TEMPORARIES = "tmp"


class BlobPaths(Protocol):
    def path(self, digest: Digest) -> Path:
        """Return where a blob stands, whether or not it is there."""
        ...


class ChildBuilder:
    """Builds packs under `root`; call it for one pack at a time."""

    def __init__(
        self,
        root: Path,
        blobs: BlobPaths,
        *,
        timeout_s: float = 1800.0,
        memory_bytes: int = 1 << 30,
        max_pack_bytes: int = 1 << 36,
    ) -> None:
        # The child works in a folder of its own.
        self._root = root.absolute()
        self._blobs = blobs
        self._timeout_s = timeout_s
        self._limits = Limits(memory_bytes, ceil(timeout_s) * (os.cpu_count() or 1), max_pack_bytes)

    async def build(self, variant: Manifest, source: Manifest | None = None) -> None:
        """Build the pack of `variant`, in full or from `source`; a delta needs the full one.

        Raises:
            NotFound: a file of either is not in the blob store.
            Unavailable: it did not work out, with the reason; nothing remains.
        """
        ours, theirs = await asyncio.to_thread(self._sides, variant, source)
        pack = PackId(Digest(ours.digest), None if theirs is None else Digest(theirs.digest))
        try:
            with tempfile.TemporaryDirectory(dir=self._root / TEMPORARIES) as folder:
                order = Order(self._limits, self._root, Path(folder) / "pack", ours, theirs)
                await self._run(order, Path(folder))
                await asyncio.to_thread(publish_file, order.target, pack.path(self._root))
        except OSError as error:
            raise Unavailable(f"disk: {error.strerror or error}; free some space and try again") from error

    def _sides(self, variant: Manifest, source: Manifest | None) -> tuple[Side, Side | None]:
        return self._side(variant), None if source is None else self._side(source)

    def _side(self, manifest: Manifest) -> Side:
        paths = {file.path: self._blobs.path(Digest(file.digest)).absolute() for file in manifest.files}
        for name, path in paths.items():
            if not path.is_file():
                raise NotFound(
                    f"{manifest.model} {manifest.version}: {name!r} is not in the blob store; publish it again"
                )
        return Side(manifest.digest(), manifest.to_bytes().decode(), paths)

    async def _run(self, order: Order, folder: Path) -> None:
        async with _child(folder) as process:
            try:
                async with asyncio.timeout(self._timeout_s):
                    content = await _converse(process, ORDER.dump_json(order))
                    status = await process.wait()
            except TimeoutError as error:
                raise Unavailable(f"pack: building took longer than {self._timeout_s:g} s and was stopped") from error
        _require_done(status, content)


@asynccontextmanager
async def _child(folder: Path) -> AsyncIterator[Process]:
    """Start the child; afterwards it is gone, however the block was left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", _MODULE),
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        cwd=folder,
        env=_environment(folder),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _environment(folder: Path) -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }


async def _converse(process: Process, order: bytes) -> bytes:
    """Send the order and return the reply. Standard input stays open meanwhile."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError, ConnectionResetError, RuntimeError):
        # A child that died at once has a status that says more; uvloop's word for its closed pipe is RuntimeError.
        process.stdin.write(order + b"\n")
        await process.stdin.drain()
    content = b""
    while len(content) <= MAX_REPLY_BYTES and (block := await process.stdout.read(1 << 16)):
        content += block
    return content


def _require_done(status: int, content: bytes) -> None:
    if status != 0:
        cause = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        raise Unavailable(f"pack: its process ended with {cause}; raise its bounds or free memory, then try again")
    try:
        reply = REPLY.validate_json(content)
    except ValidationError as error:
        raise Unavailable(f"pack: its process gave an unreadable reply of {len(content)} bytes; try again") from error
    if reply.refusal is not None:
        raise Unavailable(f"pack: {reply.refusal}")
