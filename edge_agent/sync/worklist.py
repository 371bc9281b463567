"""What is missing of a variant, and where each missing chunk belongs: the same bytes may stand at several places."""

from collections.abc import Callable

from core.chunks import ChunkRef, chunks_of
from core.digest import Digest
from core.manifest import MAX_CHUNK_BYTES, Manifest
from edge_agent.sync.assembly import Assembly
from edge_agent.sync.chunk_writer import ChunkWriter
from edge_agent.sync.store import ContentStore


def _nobody() -> None:
    """Hear that a chunk is safe, and do nothing."""


class Worklist:
    """Methods block on the disk, but for the properties on bytes and chunks; the thread of `store` calls them."""

    def __init__(self, manifest: Manifest, store: ContentStore) -> None:
        self.manifest = manifest
        # By digest: one file may stand under several names.
        self.assemblies: dict[Digest, Assembly] = {}
        chunks: dict[str, list[ChunkRef]] = {}
        for ref in chunks_of(manifest):
            chunks.setdefault(ref.file.path, []).append(ref)
        for file in manifest.files:
            digest = Digest(file.digest)
            if digest not in self.assemblies and not store.has(digest):
                self.assemblies[digest] = store.assembly(file, chunks.get(file.path, ()))
        self._writer = ChunkWriter(room_bytes=MAX_CHUNK_BYTES)
        self._places: dict[bytes, list[tuple[Assembly, ChunkRef]]] = {}
        for assembly in self.assemblies.values():
            for ref in assembly.chunks:
                self._places.setdefault(ref.digest, []).append((assembly, ref))

    @property
    def stored_bytes(self) -> int:
        return self.manifest.size_bytes - sum(
            file.size_bytes - self.assemblies[digest].stored_bytes
            for file in self.manifest.files
            if (digest := Digest(file.digest)) in self.assemblies
        )

    @property
    def unallocated_bytes(self) -> int:
        return sum(assembly.unallocated_bytes for assembly in self.assemblies.values())

    def close(self) -> None:
        """Close what `put` keeps open."""
        self._writer.close()

    def missing(self) -> list[ChunkRef]:
        """Return what is not here, ascending, the same bytes once."""
        found: dict[bytes, ChunkRef] = {}
        for assembly in self.assemblies.values():
            for ref in assembly.missing:
                found.setdefault(ref.digest, ref)
        return sorted(found.values(), key=lambda ref: ref.index)

    def doubtful(self) -> list[ChunkRef]:
        """Return chunks that an earlier process may have left here."""
        return [ref for assembly in self.assemblies.values() if not assembly.is_new for ref in assembly.missing]

    def recheck(self, ref: ChunkRef) -> None:
        """Take in what an earlier process left of a chunk."""
        for assembly, place in self._places[ref.digest]:
            assembly.recheck(place)

    def put(self, ref: ChunkRef, content: bytes | memoryview, on_safe: Callable[[], object] = _nobody) -> None:
        """Put the bytes of a chunk, which are verified, wherever it belongs; they count as stored.

        `on_safe` is called when they get there even if this process is killed.
        """
        *others, (assembly, place) = self._places[ref.digest]
        for other, elsewhere in others:
            other.write(elsewhere, content, self._writer, _nobody)
        assembly.write(place, content, self._writer, on_safe)
