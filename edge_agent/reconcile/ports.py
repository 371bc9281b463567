"""What reconciling needs of others, as protocols: bytes brought into the store, and models run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from core.digest import Digest
from core.ids import ModelName
from core.manifest import Manifest


class VariantSource(Protocol):
    async def variant(self, digest: Digest, on_progress: Callable[[int, int], None]) -> Manifest:
        """Bring manifest and files into the store, telling of (stored, total) bytes; may be cancelled at any time."""
        ...


class ModelHost(Protocol):
    async def load(self, manifest: Manifest, digest: Digest, folder: Path) -> None:
        """Load and warm up, switch atomically, then drain and close the one it replaces."""
        ...

    async def unload(self, model: ModelName) -> None:
        """Drain and close; nothing happens when the model does not run."""
        ...

    def running(self) -> Mapping[ModelName, Digest]: ...
