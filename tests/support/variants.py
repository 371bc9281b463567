"""Variants made on the spot: a manifest and the bytes of everything that it names."""

from dataclasses import dataclass

from core.chunks import chunk_of
from core.digest import Digest, digest_of
from core.fleet_state import Slot
from core.ids import ModelName, VariantName
from core.manifest import MAX_CHUNK_BYTES, Batching, File, Lineage, Manifest, Signature
from core.tensors import Datatype


@dataclass(frozen=True, slots=True)
class MadeVariant:
    manifest: Manifest
    digest: Digest
    # The manifest's own bytes among them.
    blobs: dict[Digest, bytes]

    @property
    def slot(self) -> Slot:
        found = self.manifest
        return Slot(ModelName(found.model), found.version, VariantName(found.variant), self.digest)


def made_variant(
    files: dict[str, bytes] | None = None,
    *,
    model: str = "digits",
    version: int = 1,
    variant: str = "int8",
    chunk_bytes: int = MAX_CHUNK_BYTES,
) -> MadeVariant:
    """Return a variant of `files`, the first of which is the entry; every (n, 8) float goes in, (n, 3) comes out."""
    contents = files or {"model.onnx": f"{model} {version} {variant}".encode()}
    manifest = Manifest(
        model=model,
        version=version,
        variant=variant,
        entry=next(iter(contents)),
        files=tuple(
            File(
                path=path,
                digest=digest_of(content),
                size_bytes=len(content),
                chunks=tuple(chunk_of(content[at : at + chunk_bytes]) for at in range(0, len(content), chunk_bytes)),
            )
            for path, content in contents.items()
        ),
        inputs=(Signature(name="x", datatype=Datatype.FP32, shape=(-1, 8)),),
        outputs=(Signature(name="y", datatype=Datatype.FP32, shape=(-1, 3)),),
        batching=Batching(max_batch=8),
        lineage=Lineage(recipe="original"),
    )
    blobs = {digest_of(content): content for content in (manifest.to_bytes(), *contents.values())}
    return MadeVariant(manifest, manifest.digest(), blobs)
