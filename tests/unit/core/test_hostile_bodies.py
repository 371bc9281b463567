"""Whatever the bytes are: a body is decoded or refused with a typed error, and memory stays in proportion to it."""

import tracemalloc
from collections.abc import Callable

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest, NanofleetError, TooLarge
from core.open_inference import binary_body, json_body, protobuf_body
from core.open_inference.messages import InferRequest
from core.tensors import NUMPY_DTYPE
from protos.inference.v2 import open_inference_pb2 as pb
from tests.support.open_inference_strategies import PATIENT, requests

Refused = (InvalidRequest, TooLarge)
# Pieces that mean something to a parser; random bytes alone rarely get past its first check.
FRAGMENTS = (
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"NaN", b"-1", b"1e999", b"\\", b"\\ud800", b'"shape"',
    b'"data"', b'"binary_data_size"', b'"BYTES"', b"9" * 30, b"\xff\xff\xff\x7f", b"\0",
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, body: bytes) -> bytes:
    """A valid body with a few of its places cut out, repeated or written over."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 16)))
        body = body[:start] + draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=8)) + body[end:]
    return body


def decode_protobuf(body: bytes) -> InferRequest:
    return protobuf_body.decode_request(protobuf_body.parse_request(body))


def require_typed_outcome(decode: Callable[[], InferRequest]) -> None:
    try:
        request = decode()
    except Refused:
        return
    assert request.inputs
    for tensor in request.inputs:
        assert tensor.array.dtype == NUMPY_DTYPE[tensor.datatype]


@PATIENT
@given(st.binary(max_size=200), st.integers(-1, 200))
def test_random_bytes_are_refused_by_every_codec(body: bytes, header_length: int) -> None:
    require_typed_outcome(lambda: json_body.decode_request(body, model_name="m"))
    require_typed_outcome(lambda: binary_body.decode_request(body, header_length=header_length, model_name="m"))
    require_typed_outcome(lambda: decode_protobuf(body))


@PATIENT
@given(st.data(), requests(json=True))
def test_a_mutated_json_body_is_taken_or_refused(data: st.DataObject, request: InferRequest) -> None:
    body = data.draw(mutated(json_body.encode_request(request)))
    require_typed_outcome(lambda: json_body.decode_request(body, model_name="m"))


@PATIENT
@given(st.data(), requests())
def test_a_mutated_binary_body_is_taken_or_refused(data: st.DataObject, request: InferRequest) -> None:
    valid, header_length = binary_body.encode_request(request)
    body = data.draw(mutated(valid))
    length = header_length + data.draw(st.sampled_from((0, 0, len(body) - len(valid), 1, -1)))
    require_typed_outcome(lambda: binary_body.decode_request(body, header_length=length, model_name="m"))


@PATIENT
@given(st.data(), requests())
def test_a_mutated_protobuf_body_is_taken_or_refused(data: st.DataObject, request: InferRequest) -> None:
    body = data.draw(mutated(protobuf_body.encode_request(request).SerializeToString()))
    require_typed_outcome(lambda: decode_protobuf(body))


def huge_json(datatype: str) -> InferRequest:
    entry = {"name": "x", "datatype": datatype, "shape": [1 << 22], "data": [1]}
    return json_body.decode_request(orjson.dumps({"inputs": [entry]}), model_name="m")


def huge_binary(datatype: str) -> InferRequest:
    entry = {"name": "x", "datatype": datatype, "shape": [1 << 22], "parameters": {"binary_data_size": 4}}
    header = orjson.dumps({"inputs": [entry]})
    return binary_body.decode_request(header + b"\0\0\0\0", header_length=len(header), model_name="m")


def huge_protobuf(datatype: str) -> InferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=[1 << 22])
    return protobuf_body.decode_request(pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[b"\0\0\0\0"]))


@pytest.mark.parametrize("decode", [huge_json, huge_binary, huge_protobuf])
@pytest.mark.parametrize("datatype", ["INT64", "BYTES", "BOOL"])
def test_a_small_body_with_a_huge_shape_takes_little_memory(
    decode: Callable[[str], InferRequest], datatype: str
) -> None:
    # Within the limit on elements, so it is the body itself that must say no.
    tracemalloc.start()
    try:
        with pytest.raises(NanofleetError):
            decode(datatype)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


@pytest.mark.parametrize(
    "unit", [b"[],", b"{},", b'"[",', b'"",', b'"[["', b"[", b'{"a":', b'{"a":1},', b'\\"[', b'"a":1,']
)
def test_a_body_of_structure_alone_takes_memory_in_proportion_to_itself(unit: bytes) -> None:
    body = b'{"a":[' + unit * ((8 << 20) // len(unit))
    tracemalloc.start()
    try:
        with pytest.raises(NanofleetError):
            json_body.decode_request(body, model_name="m")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * len(body)
