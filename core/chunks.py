"""The chunks of a variant: what agents fetch, one at a time verified against the manifest.

A file is cut into chunks of at most 1 MiB that never cross the edge of a large tensor, so that a change of one tensor
leaves the chunks of all others as they were. Where the cuts lie is the publisher's choice, written down in the
manifest; everybody else only needs sizes and digests. Position in the list of all chunks of all files is a chunk's
index, by which agent and controller speak of it.
"""

import base64
from dataclasses import dataclass

from blake3 import blake3

from core.errors import InvalidManifest
from core.manifest import Chunk, File, Manifest


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """One chunk: `size_bytes` bytes at `offset` of `file`; `digest` is its BLAKE3, 32 bytes."""

    index: int
    file: File
    offset: int
    size_bytes: int
    digest: bytes


def chunks_of(manifest: Manifest) -> tuple[ChunkRef, ...]:
    """Return every chunk of every file, in the order of the manifest.

    Raises:
        InvalidManifest: a file that is not empty has no chunks: the variant is not made for agents.
    """
    found: list[ChunkRef] = []
    for file in manifest.files:
        if file.size_bytes and not file.chunks:
            raise InvalidManifest(f"{manifest.model}: expected chunks of {file.path!r}, got none; publish it again")
        offset = 0
        for size_bytes, text in file.chunks:
            found.append(ChunkRef(len(found), file, offset, size_bytes, _raw_of(text)))
            offset += size_bytes
    return tuple(found)


def chunk_of(content: bytes | memoryview) -> Chunk:
    """Return how the manifest writes a chunk of these bytes."""
    return len(content), base64.urlsafe_b64encode(chunk_digest(content)).rstrip(b"=").decode()


def chunk_digest(content: bytes | memoryview) -> bytes:
    """Return the BLAKE3 of the bytes of a chunk; ADR 0017 says why not SHA-256."""
    return blake3(content).digest()


def _raw_of(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=")
