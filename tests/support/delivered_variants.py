"""Variants as a publisher makes them for delivery: files as blobs in a folder, cut at their tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from controller.transfer.cuts import cut_file, layout_of
from core.chunks import chunks_of
from core.digest import Digest, digest_of, hex_of
from core.manifest import File, Lineage, Manifest, Signature
from core.tensors import Datatype


class FolderBlobs:
    """Blobs in one folder, by digest; the least that has a `path`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def path(self, digest: Digest) -> Path:
        return self._folder / hex_of(digest)

    def put(self, content: bytes) -> Digest:
        digest = digest_of(content)
        self.path(digest).write_bytes(content)
        return digest


def weights(changed: int = 0, *, count: int = 300_000, name: str = "w") -> TensorProto:
    """Return int8 weights of which the first `changed` are one step further than they would be."""
    values = np.random.default_rng(0).integers(-100, 100, count, dtype=np.int8)
    values[:changed] += 1
    return numpy_helper.from_array(values, name)


def model_of(*tensors: TensorProto) -> bytes:
    graph = helper.make_graph([], "graph", [], [], list(tensors))
    return bytes(helper.make_model(graph).SerializeToString())


@dataclass(frozen=True, slots=True)
class Made:
    manifest: Manifest
    contents: Mapping[str, bytes]

    @property
    def digest(self) -> Digest:
        return self.manifest.digest()

    def chunk(self, index: int) -> bytes:
        ref = chunks_of(self.manifest)[index]
        return self.contents[ref.file.path][ref.offset : ref.offset + ref.size_bytes]


def make_variant(blobs: FolderBlobs, contents: Mapping[str, bytes], *, version: int = 1) -> Made:
    digests = {name: blobs.put(content) for name, content in contents.items()}
    paths = {name: blobs.path(digest) for name, digest in digests.items()}
    regions = layout_of(paths).regions
    files = tuple(
        File(path=name, digest=digests[name], size_bytes=len(content), chunks=cut_file(paths[name], regions[name]))
        for name, content in contents.items()
    )
    signature = (Signature(name="x", datatype=Datatype.FP32, shape=(-1,)),)
    manifest = Manifest(
        model="meter",
        version=version,
        variant="original",
        entry=next(iter(contents)),
        files=files,
        inputs=signature,
        outputs=signature,
        lineage=Lineage(recipe="original"),
    )
    return Made(manifest, contents)
