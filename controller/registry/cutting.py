"""Where published files are cut into chunks: a port, and the plain way that knows nothing of what is inside."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from core.chunks import chunk_of
from core.manifest import MAX_CHUNK_BYTES, Chunk


class Cutter(Protocol):
    async def cut(self, files: Mapping[str, Path]) -> Mapping[str, tuple[Chunk, ...]]:
        """Return the chunks of every file of a variant; keys are paths in the manifest, an empty file has none."""
        ...


class PlainCutter:
    """Cuts every 1 MiB: right for delivery, but a tensor that grows moves all that follows it."""

    async def cut(self, files: Mapping[str, Path]) -> Mapping[str, tuple[Chunk, ...]]:
        return {name: await asyncio.to_thread(_cut_plainly, path) for name, path in files.items()}


def _cut_plainly(path: Path) -> tuple[Chunk, ...]:
    with path.open("rb") as file:
        return tuple(chunk_of(block) for block in iter(lambda: file.read(MAX_CHUNK_BYTES), b""))
