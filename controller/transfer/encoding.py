"""Encoding the chunks of a variant into a pack, in full or against a variant that agents hold. Runs in the child.

Full: each chunk raw, or Zstandard where that saves 3 %. Delta: nothing for a chunk that the source has, else the
difference to the chunk of the same tensor where that is smaller. Every chunk is checked against its manifest first, so
that damage on this disk is not sent to a fleet.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.transfer.cuts import Match, layout_of, matches
from controller.transfer.packs import Form, PackFile, PackId, Payload, write_pack, write_useless
from core.chunks import ChunkRef, chunk_digest, chunks_of
from core.delta import compress, encode_difference
from core.digest import Digest
from core.errors import IntegrityError
from core.manifest import Manifest

# Chosen: below this decoding costs an agent more than the link does.
_WORTH_COMPRESSING = 0.97
# From delivery.md: a delta above it saves too little for what it costs to keep.
USELESS_RATIO = 0.7


@dataclass(frozen=True, slots=True)
class VariantFiles:
    """A variant with the places of its files; keys are paths in the manifest."""

    digest: Digest
    manifest: Manifest
    paths: Mapping[str, Path]


def build_full(variant: VariantFiles, target: Path) -> None:
    """Write the full pack of `variant` to the new file `target`."""
    chunks = chunks_of(variant.manifest)
    write_pack(target, PackId(variant.digest), _in_full(variant, chunks), count=len(chunks))


def _in_full(variant: VariantFiles, chunks: Sequence[ChunkRef]) -> Iterator[Payload]:
    for chunk in chunks:
        plain = _read(variant, chunk)
        packed = compress(plain)
        if len(packed) <= _WORTH_COMPRESSING * len(plain):
            yield Payload(Form.ZSTD, len(plain), packed)
        else:
            yield Payload(Form.RAW, len(plain), plain)


def build_delta(variant: VariantFiles, source: VariantFiles, full: PackFile, target: Path) -> None:
    """Write the pack of differences from `source` to `variant`, whose full pack is there, or that it is useless."""
    chunks = chunks_of(variant.manifest)
    pack = PackId(variant.digest, source.digest)
    delta = _Delta(variant, source, full)
    write_pack(target, pack, (delta.payload(chunk) for chunk in chunks), count=len(chunks))
    if delta.size_bytes > USELESS_RATIO * int(full.encoded_sizes.sum()):
        target.unlink()
        write_useless(target, pack)


class _Delta:
    """Encodes chunk by chunk, and counts what would travel."""

    def __init__(self, variant: VariantFiles, source: VariantFiles, full: PackFile) -> None:
        self._variant = variant
        self._source = source
        self._full = full
        source_chunks = chunks_of(source.manifest)
        self._held = {chunk.digest for chunk in source_chunks}
        self._matches: Mapping[int, Match] = matches(
            (layout_of(variant.paths), chunks_of(variant.manifest)), (layout_of(source.paths), source_chunks)
        )
        self.size_bytes = 0

    def payload(self, chunk: ChunkRef) -> Payload:
        if chunk.digest in self._held:
            return Payload(Form.SAME, chunk.size_bytes)
        in_full_bytes = self._full.entry(chunk.index).size_bytes
        match = self._matches.get(chunk.index)
        if match is not None:
            before, after = _read(self._source, match.source), _read(self._variant, chunk)
            difference = encode_difference(before, after, width=match.width)
            if len(difference) < in_full_bytes:
                self.size_bytes += len(difference)
                return Payload(Form.DIFFERENCE, chunk.size_bytes, difference, match.source.index)
        self.size_bytes += in_full_bytes
        return Payload(Form.FULL, chunk.size_bytes)


def _read(variant: VariantFiles, chunk: ChunkRef) -> bytes:
    descriptor = os.open(variant.paths[chunk.file.path], os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = os.pread(descriptor, chunk.size_bytes, chunk.offset)
    finally:
        os.close(descriptor)
    if chunk_digest(content) != chunk.digest:
        raise IntegrityError(
            f"{variant.manifest.model} {variant.manifest.version}: chunk {chunk.index} of {chunk.file.path!r} is "
            "damaged in the blob store; upload the file again"
        )
    return content
