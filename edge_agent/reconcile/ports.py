"""What reconciling needs of others, as protocols: bytes brought into the store, and models tried, run and watched."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from core.digest import Digest
from core.fleet_state import Slot, Transfer
from core.ids import ModelName
from core.manifest import Manifest
from edge_agent.activation.self_test import SelfTestResult
from edge_agent.runtime.vitals import Vitals


class VariantSource(Protocol):
    async def manifest(self, digest: Digest) -> Manifest:
        """Bring the manifest alone into the store, unless it is there; may be cancelled at any time."""
        ...

    async def variant(self, digest: Digest, on_progress: Callable[[int, int, Transfer], None]) -> Manifest:
        """Bring manifest and files into the store; may be cancelled at any time.

        Tells of bytes stored, bytes in all, and what the transfer has cost so far.

        Raises:
            PermissionRequired: whole chunks are needed on a metered link; `allow` the variant and ask again.
        """
        ...


class Terms(Protocol):
    def __call__(self, manifest: Manifest, slot: Slot) -> None:
        """Raise Untrusted when what is signed does not allow to install this on this machine."""
        ...


class SelfTester(Protocol):
    async def test(self, manifest: Manifest, folder: Path) -> SelfTestResult:
        """Try the variant where it can do no harm; may be cancelled at any time.

        Raises:
            Unavailable: it could not be tried now, which says nothing about it.
        """
        ...


class Watch(Protocol):
    def vitals(self) -> Vitals:
        """Return what was seen so far."""
        ...

    def stop(self) -> None:
        """Take no more note."""
        ...


class ModelHost(Protocol):
    async def load(self, manifest: Manifest, digest: Digest, folder: Path) -> None:
        """Load and warm up, switch atomically, then drain and close the one it replaces."""
        ...

    async def unload(self, model: ModelName) -> None:
        """Drain and close; nothing happens when the model does not run."""
        ...

    def running(self) -> Mapping[ModelName, Digest]: ...

    def watch(self, model: ModelName) -> Watch:
        """Take note of every run of a running model from now on."""
        ...
