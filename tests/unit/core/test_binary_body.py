"""Binary-tensor bodies: every byte behind the header belongs to exactly one tensor."""

import struct
from typing import Any

import numpy as np
import orjson
import pytest

from core.errors import InternalError, InvalidRequest, InvalidTensor, TooLarge
from core.open_inference import binary_body
from core.open_inference.messages import BodyLimits, InferRequest, InferResponse
from core.tensors import Datatype, Tensor


def entry(name: str, datatype: str, shape: list[int], size: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def decode(*entries: dict[str, Any], tail: bytes, limits: BodyLimits | None = None) -> InferRequest:
    header = orjson.dumps({"inputs": list(entries)})
    return binary_body.decode_request(
        header + tail, header_length=len(header), model_name="digits", limits=limits or BodyLimits()
    )


def test_tensors_take_their_bytes_in_order_and_may_stand_beside_json_data() -> None:
    middle = {"name": "b", "datatype": "INT8", "shape": [1], "data": [7]}
    request = decode(entry("a", "UINT8", [3], 3), middle, entry("c", "FP32", [1], 4), tail=b"\1\2\3" + b"\0\0\x80\x3f")
    assert [tensor.array.tolist() for tensor in request.inputs] == [[1, 2, 3], [7], [1.0]]


def test_an_array_is_aligned_wherever_its_bytes_start() -> None:
    request = decode(entry("a", "UINT8", [1], 1), entry("b", "FP64", [1], 8), tail=b"\1" + struct.pack("<d", 2.5))
    assert request.inputs[1].array.flags.aligned
    assert request.inputs[1].array.tolist() == [2.5]


@pytest.mark.parametrize(
    ("datatype", "shape", "size", "tail"),
    [
        ("FP32", [2], 4, b"\0" * 4),  # too few for the shape
        ("FP32", [1], 8, b"\0" * 8),  # too many for the shape
        ("FP32", [2], 8, b"\0" * 7),  # more than came
        ("FP32", [1], -4, b"\0" * 4),
        ("FP32", [1], 1 << 63, b"\0" * 4),
        ("FP32", [1], "4", b"\0" * 4),
        ("FP32", [1], 4.0, b"\0" * 4),
        ("FP32", [1], True, b"\0"),
        ("BOOL", [2], 2, b"\0\2"),
        ("BYTES", [1], 4, b"\1\0\0\0"),  # truncated element
        ("BYTES", [1], 3, b"\0\0\0"),  # truncated length
        ("BYTES", [2], 8, b"\4\0\0\0\0\0\0\0"),  # first element swallows the second
        ("BYTES", [1], 6, b"\1\0\0\0ab"),  # bytes left over
        ("BYTES", [1], 8, b"\xff\xff\xff\xffabcd"),  # length of 4 GiB
        ("BYTES", [1 << 20], 4, b"\0\0\0\0"),  # a million elements in four bytes
    ],
)
def test_bytes_that_are_not_the_tensor_are_refused(datatype: str, shape: list[int], size: Any, tail: bytes) -> None:
    with pytest.raises(InvalidTensor, match="'x'"):
        decode(entry("x", datatype, shape, size), tail=tail)


def test_bytes_behind_the_last_tensor_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected 1 bytes of tensors, got 3"):
        decode(entry("x", "UINT8", [1], 1), tail=b"\1\2\3")


def test_data_and_binary_data_of_one_tensor_are_refused() -> None:
    with pytest.raises(InvalidTensor, match="not the other"):
        decode({**entry("x", "UINT8", [1], 1), "data": [1]}, tail=b"\1")


@pytest.mark.parametrize("header_length", [-1, 5, 1 << 62])
def test_a_header_longer_than_the_body_is_refused(header_length: int) -> None:
    with pytest.raises(InvalidRequest, match="header length"):
        binary_body.decode_request(b"{}xx", header_length=header_length, model_name="digits")


def test_a_header_cut_short_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expected JSON"):
        binary_body.decode_request(b'{"inputs":[]}', header_length=5, model_name="digits")


def test_a_body_over_the_bound_is_too_large_whatever_its_header() -> None:
    with pytest.raises(TooLarge, match="at most 64 bytes"):
        decode(entry("x", "UINT8", [100], 100), tail=b"\0" * 100, limits=BodyLimits(max_body_bytes=64))


def test_half_precision_travels_as_its_bits() -> None:
    request = decode(entry("a", "BF16", [1], 2), entry("b", "FP16", [1], 2), tail=b"\x80\x3f\x00\x3c")
    assert request.inputs[0].array.tolist() == [0x3F80]
    assert request.inputs[1].array.tolist() == [1.0]


def test_a_response_has_raw_bytes_only_for_the_outputs_that_ask() -> None:
    outputs = (
        Tensor("label", Datatype.INT64, np.array([3])),
        Tensor("scores", Datatype.FP32, np.array([np.nan], np.float32)),
    )
    body, header_length = binary_body.encode_response(InferResponse("digits", "1", outputs), binary={"scores"})
    label, scores = orjson.loads(body[:header_length])["outputs"]
    assert label["data"] == [3]
    assert scores == entry("scores", "FP32", [1], 4)
    assert body[header_length:] == outputs[1].array.tobytes()


def test_an_output_that_is_not_finite_travels_raw_but_not_as_json() -> None:
    response = InferResponse("digits", "1", (Tensor("scores", Datatype.FP32, np.array([np.inf], np.float32)),))
    assert binary_body.encode_response(response, binary={"scores"})
    with pytest.raises(InternalError, match="'scores'"):
        binary_body.encode_response(response, binary=())


def test_a_request_asks_for_binary_outputs() -> None:
    request = InferRequest("digits", (Tensor("x", Datatype.INT8, np.zeros(1, np.int8)),))
    body, header_length = binary_body.encode_request(request)
    assert orjson.loads(body[:header_length])["parameters"] == {"binary_data_output": True}
