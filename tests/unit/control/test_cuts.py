"""Cutting files into chunks, on models made by onnx itself, and on bytes that are no model."""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from controller.transfer.cuts import Layout, TensorCutter, layout_of, matches
from controller.transfer.tensors import Malformed, Tensor, tensors_of
from core.chunks import ChunkRef, chunk_digest
from core.digest import digest_of
from core.manifest import MAX_CHUNK_BYTES, Chunk, File

LARGE = 300_000


def floats(name: str, count: int = LARGE, seed: int = 0) -> TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).random(count, np.float32), name)


def int8s(name: str, count: int = LARGE) -> TensorProto:
    return numpy_helper.from_array(np.arange(count).astype(np.int8), name)


def model_of(tensors: Sequence[TensorProto], nodes: Sequence[onnx.NodeProto] = ()) -> bytes:
    graph = helper.make_graph(list(nodes), "graph", [], [], list(tensors))
    return bytes(helper.make_model(graph).SerializeToString())


def sizes_of(chunks: Sequence[Chunk]) -> list[int]:
    return [size_bytes for size_bytes, _ in chunks]


async def cut_one(folder: Path, content: bytes, name: str = "model.onnx") -> tuple[Chunk, ...]:
    path = folder / "content"
    path.write_bytes(content)
    return (await TensorCutter().cut({name: path}))[name]


def refs(name: str, layout: Layout, chunk_bytes: int = MAX_CHUNK_BYTES) -> list[ChunkRef]:
    """Return chunks as a publisher cuts them, whose contents nobody looks at."""
    regions = layout.regions[name]
    file = File(path=name, digest=digest_of(b""), size_bytes=regions[-1].end)
    places = [
        (at, min(at + chunk_bytes, part.end)) for part in regions for at in range(part.offset, part.end, chunk_bytes)
    ]
    return [ChunkRef(index, file, start, end - start, bytes(32)) for index, (start, end) in enumerate(places)]


async def test_chunks_hold_the_file_in_order_and_whole(tmp_path: Path) -> None:
    content = model_of([floats("a"), int8s("b")])
    offset = 0
    for size_bytes, text in await cut_one(tmp_path, content):
        digest = chunk_digest(content[offset : offset + size_bytes])
        assert base64.urlsafe_b64decode(text + "=") == digest
        offset += size_bytes
    assert offset == len(content)


async def test_large_tensors_are_chunks_of_their_own(tmp_path: Path) -> None:
    chunks = sizes_of(await cut_one(tmp_path, model_of([floats("a"), int8s("b")])))
    assert MAX_CHUNK_BYTES in chunks
    assert 4 * LARGE - MAX_CHUNK_BYTES in chunks
    assert LARGE in chunks


async def test_a_tensor_that_stays_the_same_keeps_its_chunks_when_another_grows(tmp_path: Path) -> None:
    before = await cut_one(tmp_path, model_of([floats("a", 50_000), floats("b", seed=1)]))
    after = await cut_one(tmp_path, model_of([floats("a", 60_001), floats("b", seed=1)]))
    assert {size for size, _ in set(before) & set(after)} >= {MAX_CHUNK_BYTES, 4 * LARGE - MAX_CHUNK_BYTES}


async def test_small_tensors_stay_with_the_graph(tmp_path: Path) -> None:
    assert len(await cut_one(tmp_path, model_of([floats("a", 100), floats("b", 200)]))) == 1


async def test_an_empty_file_has_no_chunks(tmp_path: Path) -> None:
    assert await cut_one(tmp_path, b"") == ()


@pytest.mark.parametrize("name", ["vocabulary.txt", "model.onnx"])
async def test_what_is_no_model_is_cut_every_mebibyte(tmp_path: Path, name: str) -> None:
    chunks = await cut_one(tmp_path, b"\xff" * (2 * MAX_CHUNK_BYTES + 7), name)
    assert sizes_of(chunks) == [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, 7]


async def test_tensors_in_a_file_beside_the_model_are_chunks_of_their_own(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(model_of([floats("a"), int8s("b")]))
    onnx.save_model(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin")
    files = {"sub/model.onnx": tmp_path / "model.onnx", "sub/weights.bin": tmp_path / "weights.bin"}
    regions = layout_of(files).regions["sub/weights.bin"]
    assert [(part.size_bytes, part.width) for part in regions if part.name in ("a#1", "b#1")] == [
        (4 * LARGE, 4),
        (LARGE, 1),
    ]


def test_widths_are_those_of_the_elements() -> None:
    tensors = [
        numpy_helper.from_array(np.zeros(8, dtype), dtype) for dtype in ("int8", "float16", "float32", "float64")
    ]
    found = [tensor for tensor in tensors_of(model_of(tensors)) if isinstance(tensor, Tensor)]
    assert [(tensor.name, tensor.width) for tensor in found] == [
        ("int8", 1),
        ("float16", 2),
        ("float32", 4),
        ("float64", 8),
    ]


def test_tensors_of_attributes_and_subgraphs_are_found() -> None:
    inner = helper.make_graph([], "inner", [], [], [int8s("inside")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=int8s("constant")),
        helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
    ]
    names = [tensor.name for tensor in tensors_of(model_of([], nodes))]
    assert names == ["constant", "inside", "inside"]


def require_tensors_within(content: bytes) -> None:
    try:
        found = [tensor for tensor in tensors_of(content) if isinstance(tensor, Tensor)]
    except Malformed:
        return
    assert all(tensor.offset + tensor.size_bytes <= len(content) for tensor in found)


@given(content=st.binary(max_size=512))
def test_random_bytes_are_malformed_or_tensors_within_them(content: bytes) -> None:
    require_tensors_within(content)


SMALL_MODEL = model_of([floats("a", 5), int8s("b", 9)], [helper.make_node("Constant", [], ["c"], value=int8s("c", 3))])


@given(where=st.integers(0, len(SMALL_MODEL) - 1), value=st.integers(0, 255))
def test_a_damaged_model_is_malformed_or_still_has_tensors_within_it(where: int, value: int) -> None:
    damaged = bytearray(SMALL_MODEL)
    damaged[where] = value
    require_tensors_within(bytes(damaged))


def test_a_chain_of_subgraphs_without_an_end_is_malformed() -> None:
    content = b""
    for _ in range(40):
        # graph.node.attribute.g, innermost first.
        for field in (6, 5, 1):
            content = bytes([field << 3 | 2]) + _varint(len(content)) + content
    with pytest.raises(Malformed, match="too deep"):
        list(tensors_of(bytes([7 << 3 | 2]) + _varint(len(content)) + content))


def _varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80, number >> 7 & 0x7F | 0x80, number >> 14])


def layout_in(folder: Path, content: bytes) -> Layout:
    path = folder / digest_of(content)[-8:]
    path.write_bytes(content)
    return layout_of({"model.onnx": path})


def matched(target: Layout, source: Layout) -> dict[str, str]:
    """Return which region's first chunk is taken from which, of the large tensors."""
    ours, theirs = refs("model.onnx", target), refs("model.onnx", source)
    name_of = [
        {
            chunk.index: part.name
            for part in layout.regions["model.onnx"]
            for chunk in chunks
            if chunk.offset == part.offset
        }
        for layout, chunks in ((target, ours), (source, theirs))
    ]
    found = matches((target, ours), (source, theirs))
    return {
        name: name_of[1][found[index].source.index]
        for index, name in name_of[0].items()
        if index in found and not name.startswith("after ")
    }


def test_chunks_are_matched_by_the_name_of_their_tensor(tmp_path: Path) -> None:
    target = layout_in(tmp_path, model_of([floats("a"), floats("b", seed=1)]))
    source = layout_in(tmp_path, model_of([floats("b"), floats("a", seed=1)]))
    assert matched(target, source) == {"a#1": "a#1", "b#1": "b#1"}


def test_renamed_tensors_are_matched_by_size_and_order(tmp_path: Path) -> None:
    target = layout_in(tmp_path, model_of([floats("kept"), floats("new"), int8s("other")]))
    source = layout_in(tmp_path, model_of([int8s("one"), floats("kept"), floats("old")]))
    assert matched(target, source) == {"kept#1": "kept#1", "new#1": "old#1", "other#1": "one#1"}


def test_a_tensor_that_is_new_has_no_match(tmp_path: Path) -> None:
    target = layout_in(tmp_path, model_of([floats("a"), int8s("b")]))
    source = layout_in(tmp_path, model_of([floats("a")]))
    assert matched(target, source) == {"a#1": "a#1"}


def test_every_chunk_of_a_longer_tensor_is_matched_as_far_as_the_shorter_goes(tmp_path: Path) -> None:
    target = layout_in(tmp_path, model_of([floats("a", 600_000)]))
    source = layout_in(tmp_path, model_of([floats("a", 300_000)]))
    ours, theirs = refs("model.onnx", target), refs("model.onnx", source)
    found = matches((target, ours), (source, theirs))
    large = [chunk.index for chunk in ours if chunk.size_bytes > 1000]
    assert [index in found for index in large] == [True, True, False]
    assert all(found[index].width == 4 for index in large[:2])
