"""Chunks of the variants that are here already: to be copied where they are the same, and to take differences from.

Nothing is believed because it was right once: every chunk is hashed when it is read, and one that rotted or was
removed counts as not here.
"""

import os
from collections.abc import Collection, Sequence

from core.chunks import ChunkRef, chunk_digest, chunks_of
from core.digest import Digest
from core.errors import InvalidManifest
from core.manifest import Manifest
from edge_agent.sync.store import ContentStore


class HeldChunks:
    """Methods block on the disk; the thread of `store` calls them. Only chunks that are `wanted` are looked for."""

    def __init__(self, store: ContentStore, wanted: Collection[bytes]) -> None:
        self._store = store
        self._wanted = wanted
        self._same: dict[bytes, ChunkRef] = {}
        self._chunks: dict[Digest, Sequence[ChunkRef]] = {}

    def add(self, digest: Digest, manifest: Manifest) -> None:
        """Take in a variant that is wholly in the store."""
        try:
            chunks = chunks_of(manifest)
        except InvalidManifest:
            return  # It came before there were chunks.
        self._chunks[digest] = chunks
        self._same.update((ref.digest, ref) for ref in chunks if ref.digest in self._wanted)

    def may_have(self, wanted: ChunkRef) -> bool:
        """Say whether a look at the disk is worth it."""
        return wanted.digest in self._same

    def same(self, wanted: ChunkRef) -> bytes | None:
        """Return the bytes of a chunk that another variant has too; None when none has it."""
        found = self._same.get(wanted.digest)
        return None if found is None else self._read(found)

    def source(self, manifest: Digest | None, index: int) -> bytes | None:
        """Return the chunk that a difference was taken from; None when it is not here, or no longer what it was."""
        chunks = self._chunks.get(manifest) if manifest is not None else None
        return self._read(chunks[index]) if chunks is not None and index < len(chunks) else None

    def _read(self, ref: ChunkRef) -> bytes | None:
        try:
            descriptor = os.open(self._store.blob_path(Digest(ref.file.digest)), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            content = os.pread(descriptor, ref.size_bytes, ref.offset)
        finally:
            os.close(descriptor)
        return content if chunk_digest(content) == ref.digest else None
