"""JSON bodies: what fits a tensor exactly is taken, anything else is refused by its reason."""

from typing import Any

import numpy as np
import orjson
import pytest

from core.errors import InternalError, InvalidRequest, InvalidTensor, TooLarge
from core.open_inference import json_body
from core.open_inference.messages import BodyLimits, InferRequest, InferResponse, RequestedOutput
from core.tensors import Datatype, Tensor


def tensor_entry(datatype: str, shape: list[Any], data: Any, **more: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": shape, "data": data, **more}


def decode(*inputs: dict[str, Any], limits: BodyLimits | None = None, **more: Any) -> InferRequest:
    body = orjson.dumps({"inputs": list(inputs), **more})
    return json_body.decode_request(body, model_name="digits", limits=limits or BodyLimits())


def response_of(array: Any, datatype: Datatype) -> InferResponse:
    return InferResponse("digits", "1", (Tensor("scores", datatype, array),))


@pytest.mark.parametrize("data", [[1, 2.5, 3, 4, 5, 6], [[1, 2.5, 3], [4, 5, 6]]], ids=["flat", "nested"])
def test_flat_and_nested_data_are_the_same_array(data: Any) -> None:
    array = decode(tensor_entry("FP32", [2, 3], data)).inputs[0].array
    assert array.dtype == np.float32
    assert array.tolist() == [[1, 2.5, 3], [4, 5, 6]]


@pytest.mark.parametrize(("shape", "data"), [([], [7]), ([0], []), ([2, 0], [[], []]), ([0, 4], [])])
def test_scalars_and_empty_tensors_are_taken(shape: list[int], data: Any) -> None:
    assert decode(tensor_entry("INT64", shape, data)).inputs[0].array.shape == tuple(shape)


def test_unknown_fields_are_ignored_and_known_ones_may_be_null() -> None:
    request = decode(
        tensor_entry("INT8", [1], [1], parameters=None, colour="blue"), id=None, parameters=None, outputs=None, later={}
    )
    assert (request.id, dict(request.parameters), request.outputs) == ("", {}, ())


def test_requested_outputs_keep_their_order_and_their_wish_for_binary_data() -> None:
    request = decode(
        tensor_entry("INT8", [1], [1]),
        outputs=[{"name": "b", "parameters": {"binary_data": True}}, {"name": "a"}],
        parameters={"binary_data_output": True, "timeout": 5},
    )
    assert request.outputs == (RequestedOutput("b", binary=True), RequestedOutput("a"))
    assert (request.binary_output, dict(request.parameters)) == (True, {"timeout": 5})


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("BOOL", 1), ("BOOL", "true"), ("BOOL", None),
        ("UINT8", 256), ("UINT8", -1), ("UINT8", 1.0), ("UINT8", True), ("UINT8", "1"),
        ("INT8", 128), ("INT16", 1 << 15), ("INT32", -(1 << 31) - 1), ("INT64", 1 << 63), ("UINT64", -1),
        ("INT64", 1.5), ("INT64", None), ("UINT32", {}),
        ("FP32", 1e39), ("FP32", True), ("FP32", None), ("FP32", "1.5"), ("FP32", [1.0]), ("FP64", "NaN"),
        ("FP16", 1.0), ("BF16", 1.0),
        ("BYTES", 1), ("BYTES", None), ("BYTES", [104, 105]),
    ],
)  # fmt: skip
def test_an_element_that_does_not_fit_its_datatype_is_refused(datatype: str, value: Any) -> None:
    with pytest.raises(InvalidTensor, match=f"'x'.*{datatype}"):
        decode(tensor_entry(datatype, [2], [value, value]))


@pytest.mark.parametrize("text", [b"1e999", b"99999999999999999999"])
def test_an_integer_tensor_refuses_numbers_beyond_any_integer(text: bytes) -> None:
    with pytest.raises(InvalidRequest):
        json_body.decode_request(
            b'{"inputs":[{"name":"x","datatype":"UINT64","shape":[1],"data":[' + text + b"]}]}", model_name="m"
        )


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([3], [1, 2]), ([2], [1, 2, 3]), ([2, 2], [[1, 2], [3]]), ([2, 2], [[1, 2, 3, 4]]), ([2, 2], [[1, 2], 3]),
        ([2], [[1], [2]]), ([2, 1], [[[1]], [[2]]]), ([1], 1), ([1], None), ([1], {"0": 1}), ([0], [[]]),
    ],
)  # fmt: skip
def test_data_of_another_form_than_the_shape_is_refused(shape: list[int], data: Any) -> None:
    with pytest.raises(InvalidTensor, match="'x'"):
        decode(tensor_entry("INT32", shape, data))


@pytest.mark.parametrize("shape", [[-1], [1.0], [True], ["1"], [None], 4, None, "4", [1] * 9])
def test_a_shape_that_is_none_is_refused(shape: Any) -> None:
    with pytest.raises(InvalidTensor, match="'x'"):
        decode(tensor_entry("INT32", shape, [1]))


@pytest.mark.parametrize("shape", [[1 << 40], [1 << 30, 1 << 30], [0, 1 << 62], [(1 << 64) - 1] * 8])
def test_a_huge_shape_is_refused_as_too_large(shape: list[int]) -> None:
    with pytest.raises(TooLarge, match="elements"):
        decode(tensor_entry("INT32", shape, [1]))


@pytest.mark.parametrize("datatype", ["FP8", "fp32", "", None, 1, [], {}])
def test_an_unknown_datatype_is_refused_naming_the_known_ones(datatype: Any) -> None:
    with pytest.raises(InvalidTensor, match="expected a datatype of BOOL"):
        decode(tensor_entry(datatype, [1], [1]))


def test_two_inputs_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidTensor, match="'x' 2 times"):
        decode(tensor_entry("INT8", [1], [1]), tensor_entry("INT8", [1], [2]))


def test_binary_data_in_a_json_body_is_refused() -> None:
    entry = {"name": "x", "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}}
    with pytest.raises(InvalidTensor, match="binary_data_size"):
        decode(entry)


@pytest.mark.parametrize(
    "field",
    [
        {"id": 5}, {"id": "x" * 1025}, {"parameters": []}, {"parameters": {"a": [1]}}, {"parameters": {"a": None}},
        {"parameters": {"a": "x" * 1025}}, {"parameters": {"binary_data_output": 1}},
        {"outputs": {}}, {"outputs": [1]}, {"outputs": [{"name": 1}]}, {"outputs": [{"name": "y"}, {"name": "y"}]},
        {"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
        {"outputs": [{"name": "y", "parameters": {"classification": 3}}]},
        {"inputs": []}, {"inputs": None}, {"inputs": {}}, {"inputs": ["x"]}, {"inputs": [{"shape": [1]}]},
    ],
)  # fmt: skip
def test_a_malformed_field_is_refused(field: dict[str, Any]) -> None:
    body = orjson.dumps({"inputs": [tensor_entry("INT8", [1], [1])], **field})
    with pytest.raises(InvalidRequest):
        json_body.decode_request(body, model_name="digits")


def test_every_count_has_its_bound() -> None:
    entry = tensor_entry("INT8", [1], [1])
    limits = BodyLimits(max_tensors=2, max_parameters=2, max_body_bytes=500)
    with pytest.raises(TooLarge, match="inputs: expected at most 2, got 3"):
        decode(entry, entry, entry, limits=limits)
    with pytest.raises(TooLarge, match="outputs: expected at most 2, got 3"):
        decode(entry, outputs=[{"name": name} for name in "abc"], limits=limits)
    with pytest.raises(TooLarge, match="parameters: expected at most 2, got 3"):
        decode(entry, parameters={"a": 1, "b": 2, "c": 3}, limits=limits)
    with pytest.raises(TooLarge, match="body: expected at most 500 bytes"):
        decode(entry, id="x" * 500, limits=limits)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_cannot_be_encoded_and_is_named(value: float) -> None:
    array = np.array([1.0, value], np.float32)
    with pytest.raises(InternalError, match="'scores'"):
        json_body.encode_response(response_of(array, Datatype.FP32))


def test_an_input_that_is_not_finite_is_the_callers_fault() -> None:
    request = InferRequest("digits", (Tensor("x", Datatype.FP64, np.array([np.nan])),))
    with pytest.raises(InvalidTensor, match="'x'"):
        json_body.encode_request(request)


def test_the_word_null_in_a_text_is_no_sign_of_a_missing_number() -> None:
    texts = np.array([b"null"], dtype=object)
    assert b'"null"' in json_body.encode_response(response_of(texts, Datatype.BYTES))


@pytest.mark.parametrize(
    ("array", "datatype"),
    [(np.zeros(1, np.float16), Datatype.FP16), (np.array([b"\xff"], dtype=object), Datatype.BYTES)],
)
def test_an_output_without_json_form_names_binary_data_as_the_remedy(array: Any, datatype: Datatype) -> None:
    with pytest.raises(InvalidRequest, match="ask for it as binary data"):
        json_body.encode_response(response_of(array, datatype))


def test_an_array_that_is_not_contiguous_is_encoded_row_by_row() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    document = orjson.loads(json_body.encode_response(response_of(array, Datatype.INT32)))
    assert document["outputs"][0]["data"] == [0, 3, 1, 4, 2, 5]
    assert document["outputs"][0]["shape"] == [3, 2]


def test_a_response_has_the_fields_of_the_protocol_and_no_empty_ones() -> None:
    document = orjson.loads(json_body.encode_response(response_of(np.array([0.5], np.float32), Datatype.FP32)))
    entry = {"name": "scores", "shape": [1], "datatype": "FP32", "data": [0.5]}
    assert document == {"model_name": "digits", "model_version": "1", "outputs": [entry]}
