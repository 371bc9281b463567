"""What stands in for the signed catalogue and its director where trust is not the subject of a test."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from controller.registry.model import Variant
from core.chunks import chunk_of
from core.fleet_state import AgentHello, DesiredState, SignedAssignment, Slot
from core.fleet_wire import encode_desired
from core.manifest import MAX_CHUNK_BYTES, Chunk


class OpenCatalogue:
    """Lets agents install everything."""

    def require_released(self, slot: Slot) -> None:
        pass

    async def release(self, variants: Sequence[Variant]) -> None:
        pass


class UnsigningDirector:
    """Sends what an agent shall run with a signature that nobody would believe."""

    async def signed(self, desired: DesiredState, _hello: AgentHello) -> SignedAssignment:
        return unsigned(desired)


class PlainCutter:
    """Cuts every 1 MiB, whatever is inside."""

    async def cut(self, files: Mapping[str, Path]) -> Mapping[str, tuple[Chunk, ...]]:
        return {name: await asyncio.to_thread(_cut_plainly, path) for name, path in files.items()}


def unsigned(desired: DesiredState) -> SignedAssignment:
    return SignedAssignment(encode_desired(desired).SerializeToString(), b"no signature", "no key")


def _cut_plainly(path: Path) -> tuple[Chunk, ...]:
    with path.open("rb") as file:
        return tuple(chunk_of(block) for block in iter(lambda: file.read(MAX_CHUNK_BYTES), b""))
