"""Manifests: one spelling, whatever is hostile refused, and nothing that lands outside its folder."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.digest import digest_of
from core.errors import InvalidManifest
from core.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from core.tensors import Datatype, TensorSpec
from tests.support.open_inference_strategies import PATIENT

DIGEST = digest_of(b"model")
CASCADE = {
    "escalate_to": "digits-large",
    "score_output": "scores",
    "score_kind": "logits",
    "temperature": 1.5,
    "threshold": 0.9,
}


def document(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 2,
        "model": "digits",
        "version": 3,
        "variant": "int8-static",
        "platform": "onnx_onnxv1",
        "entry": "model.onnx",
        "files": [{"path": "model.onnx", "digest": DIGEST, "size_bytes": 5}],
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}],
        "batching": {"max_batch": 8},
        "cascade": CASCADE,
        "lineage": {"recipe": "int8-static", "parent": DIGEST},
        **changes,
    }


def parsed(changes: Mapping[str, Any]) -> Manifest:
    return parse_manifest(orjson.dumps(document(**changes)))


def file_at(path: str) -> dict[str, Any]:
    return {"path": path, "digest": DIGEST, "size_bytes": 1}


def test_a_manifest_is_read_back_from_its_canonical_bytes() -> None:
    manifest = parsed({})
    assert parse_manifest(manifest.to_bytes()) == manifest
    assert parse_manifest(manifest.to_bytes()).digest() == manifest.digest() == digest_of(manifest.to_bytes())


@PATIENT
@given(st.permutations(list(document())))
def test_the_digest_does_not_depend_on_the_order_of_keys(keys: list[str]) -> None:
    shuffled = {key: document()[key] for key in keys}
    assert parse_manifest(orjson.dumps(shuffled, option=orjson.OPT_INDENT_2)).digest() == parsed({}).digest()


def test_canonical_bytes_are_sorted_and_without_white_space() -> None:
    content = parsed({}).to_bytes()
    assert content == orjson.dumps(orjson.loads(content), option=orjson.OPT_SORT_KEYS)


def test_the_canonical_bytes_never_change() -> None:
    # A digest is a name that other machines hold: a new field needs a default that leaves old digests as they are.
    expected = "sha256:f7b2e51db1558536cf29ab6253dee15d5f4310c46bb17e71bec68af1c101c86c"
    assert parsed({}).digest() == expected


def test_sizes_and_specifications_come_from_the_entries() -> None:
    manifest = parsed({"files": [{**file_at("model.onnx"), "size_bytes": 7}, {**file_at("w.bin"), "size_bytes": 9}]})
    assert manifest.size_bytes == 16
    assert manifest.inputs[0].spec() == TensorSpec("x", Datatype.FP32, (-1, 64))


@pytest.mark.parametrize(
    "path",
    [
        "", "/etc/passwd", "../model.onnx", "a/../../b", "a/./b", "a//b", ".hidden", "a/.hidden", "a\\b", "C:/x", "a b",
        "a\n", "a\x00", "a/", "~x", "-x", "é", "x" * 256,
    ],
)  # fmt: skip
def test_a_path_that_could_leave_its_folder_is_refused(path: str) -> None:
    with pytest.raises(InvalidManifest, match="path"):
        parsed({"files": [file_at("model.onnx"), file_at(path)]})


def test_a_path_cannot_be_file_and_folder() -> None:
    with pytest.raises(InvalidManifest, match="'a/b' to be a file or a folder"):
        parsed({"files": [file_at("model.onnx"), file_at("a/b"), file_at("a/b/c")]})


@pytest.mark.parametrize(
    "changes",
    [
        {"entry": "other.onnx"}, {"files": []}, {"files": [file_at("model.onnx")] * 2},
        {"files": [{**file_at("model.onnx"), "digest": DIGEST.upper()}]},
        {"files": [{**file_at("model.onnx"), "digest": DIGEST + "\n"}]},
        {"files": [{**file_at("model.onnx"), "size_bytes": -1}]}, {"files": [{**file_at("model.onnx"), "mode": 511}]},
        {"model": "../digits"}, {"version": 0}, {"version": "3"}, {"version": 3.0}, {"version": True},
        {"schema_version": 1}, {"platform": "tensorflow"}, {"unknown": 1}, {"inputs": []}, {"outputs": None},
        {"inputs": [{"name": "x", "datatype": "FP8", "shape": [1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1] * 9}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}] * 2},
        {"batching": {"max_batch": 0}}, {"cascade": {**CASCADE, "score_output": "none"}},
        {"cascade": {**CASCADE, "threshold": 1.5}}, {"cascade": {**CASCADE, "temperature": 0}},
        {"cascade": {**CASCADE, "score_kind": "guess"}},
    ],
)  # fmt: skip
def test_a_contradiction_or_a_value_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest, match="manifest"):
        parsed(changes)


@pytest.mark.parametrize("key", ["model", "version", "variant", "entry", "files", "inputs", "outputs", "lineage"])
def test_a_missing_key_is_named(key: str) -> None:
    whole = document()
    del whole[key]
    with pytest.raises(InvalidManifest, match=f"manifest: {key}: "):
        parse_manifest(orjson.dumps(whole))


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize("key", ["threshold", "temperature"])
def test_a_number_that_is_not_finite_is_refused(key: str, number: bytes) -> None:
    content = orjson.dumps(document(cascade={**CASCADE, key: "HERE"})).replace(b'"HERE"', number)
    with pytest.raises(InvalidManifest):
        parse_manifest(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model":' * 10_000, b" " * (MAX_MANIFEST_BYTES + 1)],
)
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(content)


def test_the_refusal_stays_short_whatever_the_peer_wrote() -> None:
    with pytest.raises(InvalidManifest) as caught:
        parsed({"x" * 100_000: 1})
    assert len(str(caught.value)) < 500


@PATIENT
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(content)


def test_a_manifest_may_say_how_far_the_data_of_its_requests_may_go() -> None:
    assert parsed({}).privacy is None
    assert parsed({"privacy": "site"}).privacy == "site"
    assert b"privacy" not in parsed({}).to_bytes()
    assert parse_manifest(parsed({"privacy": "device"}).to_bytes()).privacy == "device"


def test_a_manifest_with_a_privacy_class_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidManifest, match="privacy"):
        parsed({"privacy": "public"})
