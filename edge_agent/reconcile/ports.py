"""What reconciling needs of others, as protocols: bytes brought into the store, and models run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from core.digest import Digest
from core.fleet_state import Transfer
from core.ids import ModelName
from core.manifest import Manifest


class VariantSource(Protocol):
    async def variant(self, digest: Digest, on_progress: Callable[[int, int, Transfer], None]) -> Manifest:
        """Bring manifest and files into the store; may be cancelled at any time.

        Tells of bytes stored, bytes in all, and what the transfer has cost so far.

        Raises:
            PermissionRequired: whole chunks are needed on a metered link; `allow` the variant and ask again.
        """
        ...


class ModelHost(Protocol):
    async def load(self, manifest: Manifest, digest: Digest, folder: Path) -> None:
        """Load and warm up, switch atomically, then drain and close the one it replaces."""
        ...

    async def unload(self, model: ModelName) -> None:
        """Drain and close; nothing happens when the model does not run."""
        ...

    def running(self) -> Mapping[ModelName, Digest]: ...
