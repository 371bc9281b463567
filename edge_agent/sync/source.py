"""Where the bytes of a variant come from: the controller, and later other agents near by."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from core.chunks import ChunkRef
from core.digest import Digest
from core.errors import Overloaded


class Codec(Enum):
    """How the bytes of a chunk are written; see `core.delta`."""

    RAW = "raw"
    ZSTD = "zstd"
    DIFFERENCE = "difference"


@dataclass(frozen=True, slots=True)
class Arrived:
    """A chunk as it travelled, bounded but not yet believed; a DIFFERENCE was taken from chunk `source_index`."""

    ref: ChunkRef
    codec: Codec
    data: bytes | memoryview
    source_manifest: Digest | None = None
    source_index: int = 0


class ComeBackLater(Overloaded):
    """Others are served first; ask again after `delay_s`."""

    def __init__(self, message: str, *, delay_s: float) -> None:
        super().__init__(message)
        self.delay_s = delay_s


class ChunkSource(Protocol):
    async def manifest(self, digest: Digest) -> bytes:
        """Return the bytes of a manifest, which have this digest."""
        ...

    def chunks(
        self, manifest_digest: Digest, wanted: Sequence[ChunkRef], *, held: Sequence[Digest], is_delta_only: bool
    ) -> AsyncGenerator[Arrived, None]:
        """Yield exactly the chunks `wanted`, ascending, in order; differences are to variants that are `held`.

        Close the iterator (`contextlib.aclosing`) when leaving it early.

        Raises:
            ComeBackLater: others are served first.
            PermissionRequired: only differences were asked for, and there are none.
            IntegrityError: what came is not what was asked for.
            Unavailable: nobody answers, or no longer.
            NanofleetError: what the other side answered.
        """
        ...
