"""What is sent for a chunk, and who prepares it, as values and a port. `packs` and `builder` implement it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from core.digest import Digest
from core.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Variant:
    """A manifest with its digest, which takes a tenth of a second and more to compute when there are many chunks."""

    digest: Digest
    manifest: Manifest


class Codec(StrEnum):
    """How the bytes of a chunk are written; see `core.delta`."""

    RAW = "raw"
    ZSTD = "zstd"
    DIFFERENCE = "difference"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk as it travels; a DIFFERENCE was taken from chunk `source_index` of `source_manifest`."""

    codec: Codec
    data: bytes | memoryview
    source_manifest: Digest | None = None
    source_index: int = 0
    # The variant has a delta that is worth it, and this is its word on the chunk, whatever the codec: what a metered
    # agent may be sent. Raw bytes in a delta are small parts that changed beyond recognition, such as a graph.
    is_delta: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """What bringing a variant to an agent that holds some others takes.

    `wire_bytes` counts chunks that the agent does not have already, each in its smallest form; `full_bytes` counts all
    of them without differences; `plain_bytes` is the variant itself.
    """

    wire_bytes: int
    full_bytes: int
    plain_bytes: int
    has_delta: bool


class BlobPaths(Protocol):
    def path(self, digest: Digest) -> Path:
        """Return where a blob stands, whether or not it is there."""
        ...


class Packs(Protocol):
    """Every chunk of every prepared variant, encoded beforehand."""

    async def prepare(self, to: Manifest, held: Collection[Manifest]) -> None:
        """Have the chunks of `to` encoded in full, and as differences to each of `held` where that is worth it.

        What is there already costs nothing, and who asks for what is being built waits for it. It takes seconds per
        100 MB; cancelling it stops what was begun for it, and the next who waits begins anew.

        Raises:
            InvalidManifest: it lists no chunks, so it is not made for agents.
            NotFound: a file of it is not in the blob store.
            Unavailable: the disk is full or fails otherwise.
        """
        ...

    async def encoded(self, to: Digest, index: int, held: Sequence[Digest]) -> Encoded:
        """Return chunk `index` in the smallest form that a holder of `held` can decode; nobody's: in full.

        Raises:
            NotFound: the variant is not prepared, or has no such chunk.
            IntegrityError: the pack on disk is damaged; it is dropped, so that `prepare` makes it again.
        """
        ...

    async def sizes(self, to: Digest, held: Sequence[Digest]) -> Sizes:
        """Return what a holder of `held` would be sent.

        Raises:
            NotFound: the variant is not prepared.
        """
        ...
