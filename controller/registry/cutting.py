"""Where published files are cut into chunks: a port; `controller.transfer.cuts` looks into them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from core.manifest import Chunk


class Cutter(Protocol):
    async def cut(self, files: Mapping[str, Path]) -> Mapping[str, tuple[Chunk, ...]]:
        """Return the chunks of every file of a variant; keys are paths in the manifest, an empty file has none."""
        ...
