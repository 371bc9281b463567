"""The models on this machine: content-addressed, verified, and whole whenever the power fails.

    blobs/<hex>     complete and verified; a manifest is a blob too
    partial/<hex>   a file of a variant while it is put together (see `assembly`); kept over restarts, so that a
                    transfer goes on where it stopped
    models/<hex>/   one variant as the runtime opens it: hard links to blobs, under the manifest's digest
    temporary/      folders on their way in or out; emptied at start

Everything appears under its final name by one rename, after it was written, verified and made durable. A blob is
hashed again each time that a model is made from it, so that what rotted on the disk is fetched again and never runs.
There is no index that could be lost: what is here is what the folders list, and what it is worth, its hash tells.

Methods block on the disk and the store has no lock: its owner calls it from one thread.
"""

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from core.atomic_files import publish_file, sync_folder, write_atomically
from core.chunks import ChunkRef, chunk_of
from core.digest import Digest, digest_of, digest_of_file, hex_of
from core.errors import IntegrityError, InvalidManifest, NanofleetError, NotFound
from core.manifest import File, Manifest, parse_manifest
from edge_agent.sync.assembly import Assembly

_log = logging.getLogger(__name__)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class ContentStore:
    def __init__(self, root: Path, *, free_bytes: Callable[[Path], int] = _free_bytes) -> None:
        self._blobs, self._partial = root / "blobs", root / "partial"
        self._models, self._temporary = root / "models", root / "temporary"
        self._free_bytes = free_bytes
        self._manifests: dict[Digest, Manifest] = {}
        self._assemblies: dict[Digest, Assembly] = {}
        self._pins: Counter[Digest] = Counter()
        for folder in (self._blobs, self._partial, self._models):
            folder.mkdir(parents=True, exist_ok=True)
        self._remove_temporaries()

    # What is here

    def has(self, digest: Digest) -> bool:
        return self._blob(digest).exists()

    def free_bytes(self) -> int:
        return self._free_bytes(self._blobs)

    def size_bytes(self) -> int:
        """Return the sum of what is in store, unfinished files by their full length."""
        return sum(path.stat().st_size for folder in (self._blobs, self._partial) for path in folder.iterdir())

    def manifest(self, digest: Digest) -> Manifest:
        """Return the stored manifest.

        Raises:
            NotFound: it is not here.
            IntegrityError: its bytes changed; they are removed.
            InvalidManifest: these bytes are not a manifest.
        """
        known = self._manifests.get(digest)
        if known is None:
            known = self._manifests[digest] = parse_manifest(self._read_verified(digest))
        return known

    def is_complete(self, digest: Digest) -> bool:
        """Say whether the manifest and every file that it names are here in full length."""
        try:
            manifest = self.manifest(digest)
        except NanofleetError:
            return False
        return self.has(digest) and self.stored_bytes(manifest) == manifest.size_bytes

    def stored_bytes(self, manifest: Manifest) -> int:
        """Return how many bytes of the manifest's files are here, unfinished ones included."""
        return sum(self._stored(Digest(file.digest), file.size_bytes) for file in manifest.files)

    def complete_variants(self) -> tuple[Digest, ...]:
        """Return the manifests of the variants that were loaded at least once and are still whole, in order."""
        names = sorted(folder.name for folder in self._models.iterdir())
        return tuple(digest for name in names if self.is_complete(digest := Digest(f"sha256:{name}")))

    def blob_path(self, digest: Digest) -> Path:
        """Return where a blob stands, whether or not it is there."""
        return self._blob(digest)

    def _stored(self, digest: Digest, size_bytes: int) -> int:
        if self.has(digest):
            # A blob of another length than the manifest says is none of this manifest's.
            return size_bytes if self._blob(digest).stat().st_size == size_bytes else 0
        assembly = self._assemblies.get(digest)
        return 0 if assembly is None else assembly.stored_bytes

    def _read_verified(self, digest: Digest) -> bytes:
        try:
            content = self._blob(digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"manifest {digest}: not in the store; fetch it first") from None
        found = digest_of(content)
        if found != digest:
            self._remove_blob(digest)
            raise IntegrityError(f"stored blob: expected {digest}, got {found}; it is removed, fetch it again")
        return content

    # What arrives

    def put(self, digest: Digest, content: bytes) -> None:
        """Store a small blob as a whole, such as a manifest; durable on return.

        Raises:
            IntegrityError: these are other bytes.
        """
        if (found := digest_of(content)) != digest:
            raise IntegrityError(f"blob: expected {digest}, got {found} over {len(content)} bytes; fetch it again")
        write_atomically(self._blob(digest), content)

    def assembly(self, file: File, chunks: Sequence[ChunkRef]) -> Assembly:
        """Return `file` as far as it is put together; the same one for as long as it is not published or removed."""
        digest = Digest(file.digest)
        known = self._assemblies.get(digest)
        # Another variant may have the same file at other positions, or cut it otherwise.
        if known is None or known.chunks != tuple(chunks):
            known = self._assemblies[digest] = Assembly(self._part(digest), file, chunks)
        return known

    def publish(self, digest: Digest) -> None:
        """Make the file that was put together under `digest` a durable blob; every chunk of it was accepted.

        Its bytes are not hashed as a whole once more: each stood in a chunk that has the digest of the signed manifest.
        What remains are manifests that contradict themselves and disks that change bytes, and against both of them
        `materialise` hashes the file before it is ever loaded; a whole pass for each byte that arrives is saved.
        """
        del self._assemblies[digest]
        publish_file(self._part(digest), self._blob(digest))

    # What runs

    def materialise(self, manifest: Manifest, digest: Digest) -> Path:
        """Return the folder of the variant `digest`, with every file verified and under its own name.

        Raises:
            IntegrityError: a file is missing or its bytes changed; what changed is removed.
            InvalidManifest: a file's chunks are those of the manifest, and yet it has another digest; it is removed.
        """
        for file in manifest.files:
            self._require_intact(file)
        folder = self._models / hex_of(digest)
        if not self._is_linked(folder, manifest):
            self._discard_folder(folder)
            self._link(manifest, folder)
        return folder

    def _require_intact(self, file: File) -> None:
        digest = Digest(file.digest)
        if not self.has(digest):
            raise IntegrityError(f"blob {digest}: not in the store; fetch it again")
        found = digest_of_file(self._blob(digest))
        if found == digest:
            return
        is_as_listed = self._has_chunks_of(file)
        self._remove_blob(digest)
        if is_as_listed:
            raise InvalidManifest(f"{file.path}: expected {digest}, its chunks make {found}; publish it again")
        raise IntegrityError(f"stored blob: expected {digest}, got {found}; it is removed, fetch it again")

    def _has_chunks_of(self, file: File) -> bool:
        """Say whether the blob of `file` is made of its chunks; files that never came by chunks have none."""
        path = self._blob(Digest(file.digest))
        if not path.stat().st_size == file.size_bytes == sum(size_bytes for size_bytes, _ in file.chunks):
            return False
        with path.open("rb") as content:
            return all(chunk_of(content.read(size_bytes)) == (size_bytes, text) for size_bytes, text in file.chunks)

    def _is_linked(self, folder: Path, manifest: Manifest) -> bool:
        return all(
            (folder / file.path).exists() and (folder / file.path).samefile(self._blob(Digest(file.digest)))
            for file in manifest.files
        )

    def _link(self, manifest: Manifest, folder: Path) -> None:
        building = Path(tempfile.mkdtemp(dir=self._temporary))
        for file in manifest.files:
            link = building / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(self._blob(Digest(file.digest)))
        for inner in [building, *(path for path in building.rglob("*") if path.is_dir())]:
            sync_folder(inner)
        building.rename(folder)
        sync_folder(self._models)

    # What goes

    @contextmanager
    def pinned(self, variants: Iterable[Digest]) -> Iterator[None]:
        """Keep variants from being collected inside; may be called from any thread."""
        pins = tuple(variants)
        self._pins.update(pins)
        try:
            yield
        finally:
            self._pins.subtract(pins)

    def remove_unneeded(self, *, keep: Iterable[Digest]) -> None:
        """Remove every blob, partial and folder but those of the variants `keep`, and of pinned ones."""
        variants = {*keep, *(digest for digest, pins in self._pins.copy().items() if pins)}
        needed = {hex_of(digest) for variant in variants for digest in self._digests_of(variant)}
        for folder in self._models.iterdir():
            if folder.name not in {hex_of(variant) for variant in variants}:
                self._discard_folder(folder)
        for blob in (*self._blobs.iterdir(), *self._partial.iterdir()):
            if blob.name not in needed:
                blob.unlink()
        self._manifests = {digest: found for digest, found in self._manifests.items() if digest in variants}
        self._assemblies = {digest: found for digest, found in self._assemblies.items() if hex_of(digest) in needed}

    def _digests_of(self, variant: Digest) -> Iterator[Digest]:
        yield variant
        try:
            files = self.manifest(variant).files
        except NanofleetError:
            return  # Nothing of it can be told apart; what it needs is fetched again when it is wanted again.
        yield from (Digest(file.digest) for file in files)

    def _discard_folder(self, folder: Path) -> None:
        """Remove a folder so that nobody ever sees a part of it under its name."""
        if folder.exists():
            doomed = Path(tempfile.mkdtemp(dir=self._temporary)) / folder.name
            folder.rename(doomed)
            shutil.rmtree(doomed.parent)

    def _remove_blob(self, digest: Digest) -> None:
        self._blob(digest).unlink(missing_ok=True)
        self._manifests.pop(digest, None)

    def _remove_temporaries(self) -> None:
        if self._temporary.exists():
            shutil.rmtree(self._temporary)
        self._temporary.mkdir()

    def _blob(self, digest: Digest) -> Path:
        return self._blobs / hex_of(digest)

    def _part(self, digest: Digest) -> Path:
        return self._partial / hex_of(digest)
