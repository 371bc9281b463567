"""Where files are cut into chunks, and which chunk of one version belongs to which of another.

    ┌ graph ─┬ tensor A ────────────┬ graph ┬ tensor B ─┬ graph ┐      regions: a large tensor, or what is between two
    └────────┴─ 1 MiB ─┴─ the rest ─┴───────┴───────────┴───────┘      chunks: at most 1 MiB, within one region

A chunk never crosses the edge of a large tensor, so a tensor that did not change keeps its chunks, wherever it
moved to. Tensors in files beside the model (ONNX external data) count as well. What cannot be read as a model, and
every other file, is one region: that is never an error.

Regions of two versions belong together when they have the same name: that of the tensor, or of the tensor before it;
the quantizer renames tensors at times, so those left over are paired by size and width, in order.
"""

import asyncio
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from controller.transfer.tensors import Buffer, ExternalTensor, Malformed, Tensor, tensors_of
from core.chunks import ChunkRef, chunk_of
from core.manifest import MAX_CHUNK_BYTES, Chunk

# Chosen: a chunk costs about 60 bytes of manifest and 20 on the wire; a tensor below this is coded well enough with
# what is around it.
LARGE_TENSOR_BYTES = 64 << 10
# Derived: two regions each, 60 bytes of manifest a chunk: a third of what a manifest may have.
MAX_LARGE_TENSORS = 10_000
_MODEL_SUFFIX = ".onnx"


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of a file that is cut on its own; `width` is the size of its elements, 1 where there are none."""

    name: str
    offset: int
    size_bytes: int
    width: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """The regions of every file of a variant, in order and without gaps."""

    regions: Mapping[str, tuple[Region, ...]]


class TensorCutter:
    """Cuts at the edges of large tensors; the `Cutter` of `controller.registry.cutting`."""

    async def cut(self, files: Mapping[str, Path]) -> Mapping[str, tuple[Chunk, ...]]:
        return await asyncio.to_thread(_cut, files)


def _cut(files: Mapping[str, Path]) -> Mapping[str, tuple[Chunk, ...]]:
    layout = layout_of(files)
    return {name: cut_file(path, layout.regions[name]) for name, path in files.items()}


def cut_file(path: Path, regions: Sequence[Region]) -> tuple[Chunk, ...]:
    with _mapped(path) as content:
        return tuple(
            chunk_of(content[offset : min(offset + MAX_CHUNK_BYTES, region.end)])
            for region in regions
            for offset in range(region.offset, region.end, MAX_CHUNK_BYTES)
        )


def layout_of(files: Mapping[str, Path]) -> Layout:
    """Return the regions of `files`, whose keys are paths in the manifest."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    tensors: dict[str, list[Tensor]] = {name: [] for name in files}
    for name, path in files.items():
        if name.endswith(_MODEL_SUFFIX):
            for owner, tensor in _large_tensors(name, path, sizes):
                tensors[owner].append(tensor)
    return Layout({name: _regions(name, found, sizes[name]) for name, found in tensors.items()})


def _large_tensors(name: str, path: Path, sizes: Mapping[str, int]) -> list[tuple[str, Tensor]]:
    """Return the large tensors of a model with the file that holds them; none of a file that is no model."""
    with _mapped(path) as content:
        try:
            placed = [_placed(name, tensor, sizes) for tensor in tensors_of(content) if _may_be_large(tensor)]
        except Malformed:
            return []
    return [(owner, tensor) for owner, tensor in placed if tensor.size_bytes >= LARGE_TENSOR_BYTES]


def _may_be_large(tensor: Tensor | ExternalTensor) -> bool:
    return tensor.size_bytes is None or tensor.size_bytes >= LARGE_TENSOR_BYTES


def _placed(model: str, tensor: Tensor | ExternalTensor, sizes: Mapping[str, int]) -> tuple[str, Tensor]:
    if isinstance(tensor, Tensor):
        return model, tensor
    owner = str(PurePosixPath(model).parent / tensor.location)
    if owner not in sizes:
        raise Malformed(f"external data in {owner!r}, which is not among the files")
    size_bytes = sizes[owner] - tensor.offset if tensor.size_bytes is None else tensor.size_bytes
    return owner, Tensor(tensor.name, tensor.offset, size_bytes, tensor.width)


def _regions(file: str, tensors: Sequence[Tensor], size_bytes: int) -> tuple[Region, ...]:
    """Return the tensors and what is between them; one region where they are too many, overlap or leave the file."""
    if len(tensors) > MAX_LARGE_TENSORS:
        return _whole(file, size_bytes)
    regions: list[Region] = []
    at, last, seen = 0, file, dict[str, int]()
    for tensor in sorted(set(tensors), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset < at or tensor.offset + tensor.size_bytes > size_bytes:
            return _whole(file, size_bytes)
        regions += _between(last, at, tensor.offset)
        # Names are unique within a graph only; the second of a name is another tensor.
        seen[tensor.name] = seen.get(tensor.name, 0) + 1
        last = f"{tensor.name}#{seen[tensor.name]}"
        regions.append(Region(last, tensor.offset, tensor.size_bytes, tensor.width))
        at = tensor.offset + tensor.size_bytes
    return (*regions, *_between(last, at, size_bytes))


def _whole(file: str, size_bytes: int) -> tuple[Region, ...]:
    return tuple(_between(file, 0, size_bytes))


def _between(last: str, start: int, end: int) -> list[Region]:
    return [Region(f"after {last}", start, end - start, 1)] if end > start else []


@contextmanager
def _mapped(path: Path) -> Iterator[Buffer]:
    """Lend the bytes of a file without reading them; an empty file cannot be mapped."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            yield view


# ---- between versions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Match:
    """The chunk of another version that a difference is best taken from, and the width of what both hold."""

    source: ChunkRef
    width: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chunk begins, in a way that holds across versions."""

    file: str
    region: str
    within: int


def matches(
    target: tuple[Layout, Sequence[ChunkRef]], source: tuple[Layout, Sequence[ChunkRef]]
) -> Mapping[int, Match]:
    """Return by index of the target's chunks what each is best taken from; those without a match are not in it."""
    names = _renamed(target[0], source[0])
    by_place = {place: chunk for chunk, place, _ in _places(*source)}
    found = {}
    for chunk, place, width in _places(*target):
        there = replace(place, region=names.get((place.file, place.region), place.region))
        if there in by_place:
            found[chunk.index] = Match(by_place[there], width)
    return found


def _places(layout: Layout, chunks: Sequence[ChunkRef]) -> Iterator[tuple[ChunkRef, _Place, int]]:
    """Yield every chunk that begins in a region, which are all unless the file was cut in some other way."""
    pending: dict[str, Iterator[Region]] = {name: iter(found) for name, found in layout.regions.items()}
    current: dict[str, Region] = {}
    for chunk in chunks:
        name = chunk.file.path
        while name not in current or current[name].end <= chunk.offset:
            current[name] = next(pending[name])
        region = current[name]
        yield chunk, _Place(name, region.name, chunk.offset - region.offset), region.width


def _renamed(target: Layout, source: Layout) -> dict[tuple[str, str], str]:
    """Return the source's name of the target's regions that the source has under another one."""
    renamed: dict[tuple[str, str], str] = {}
    for file, regions in target.regions.items():
        theirs = source.regions.get(file, ())
        known = {region.name for region in theirs}
        ours = {region.name for region in regions}
        left = [region for region in theirs if region.name not in ours]
        for region in regions:
            if region.name in known:
                continue
            alike = next((other for other in left if _is_alike(region, other)), None)
            if alike is not None:
                left.remove(alike)
                renamed[file, region.name] = alike.name
    return renamed


def _is_alike(one: Region, other: Region) -> bool:
    return (one.size_bytes, one.width) == (other.size_bytes, other.width)
