"""Building a pack in a child process: its work is numpy and Zstandard on gigabytes, which must not stop the event loop.

The pack appears under its name whole and durable, or not at all.
"""

import asyncio
import logging
import os
import tempfile
from math import ceil
from pathlib import Path

from pydantic import ValidationError

from controller.children.caller import call
from controller.children.confinement import Limits
from controller.transfer.child import MAX_REPLY_BYTES, ORDER, REPLY, Order, Side
from controller.transfer.model import BlobPaths
from controller.transfer.packs import PackId
from core.atomic_files import publish_file
from core.digest import Digest
from core.errors import NotFound, Unavailable
from core.logs import peer_text
from core.manifest import Manifest

_log = logging.getLogger(__name__)

_MODULE = "controller.transfer.child"
TEMPORARIES = "tmp"


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
        try:
            ended = await call(
                _MODULE,
                ORDER.dump_json(order),
                folder=folder,
                timeout_s=self._timeout_s,
                max_reply_bytes=MAX_REPLY_BYTES,
            )
        except TimeoutError as error:
            raise Unavailable(f"pack: building took longer than {self._timeout_s:g} s and was stopped") from error
        if ended.status != 0:
            _log.warning("building a pack failed", extra={"cause": ended.cause, "stderr": peer_text(ended.printed)})
            raise Unavailable(
                f"pack: its process ended with {ended.cause}; raise its bounds or free memory, then try again"
            )
        try:
            reply = REPLY.validate_json(ended.reply)
        except ValidationError as error:
            raise Unavailable(
                f"pack: its process gave an unreadable reply of {len(ended.reply)} bytes; try again"
            ) from error
        if reply.refusal is not None:
            raise Unavailable(f"pack: {reply.refusal}")
