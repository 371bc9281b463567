"""Protobuf bodies: raw or typed, never both, and every element in its field and range."""

from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRequest, InvalidTensor, TooLarge
from core.open_inference import protobuf_body
from core.open_inference.messages import BodyLimits, InferResponse, ModelMetadata
from core.tensors import Datatype, Tensor, TensorSpec
from protos.inference.v2 import open_inference_pb2 as pb

Input = pb.ModelInferRequest.InferInputTensor


def typed(datatype: str, shape: list[int], **contents: Any) -> pb.ModelInferRequest:
    tensor = Input(name="x", datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))
    return pb.ModelInferRequest(model_name="digits", inputs=[tensor])


def raw(datatype: str, shape: list[int], *contents: bytes) -> pb.ModelInferRequest:
    tensor = Input(name="x", datatype=datatype, shape=shape)
    return pb.ModelInferRequest(model_name="digits", inputs=[tensor], raw_input_contents=contents)


def response_of(datatype: Datatype, array: Any) -> InferResponse:
    return InferResponse("digits", "1", (Tensor("scores", datatype, array),))


@pytest.mark.parametrize(
    ("datatype", "contents"),
    [
        ("BOOL", {"bool_contents": [True]}), ("INT8", {"int_contents": [-128]}), ("INT32", {"int_contents": [1]}),
        ("INT64", {"int64_contents": [1 << 62]}), ("UINT8", {"uint_contents": [255]}),
        ("UINT64", {"uint64_contents": [(1 << 64) - 1]}), ("FP32", {"fp32_contents": [0.5]}),
        ("FP64", {"fp64_contents": [0.1]}), ("BYTES", {"bytes_contents": [b"\xff"]}),
    ],
)  # fmt: skip
def test_every_datatype_has_its_typed_field(datatype: str, contents: dict[str, Any]) -> None:
    request = protobuf_body.decode_request(typed(datatype, [1], **contents))
    assert [request.inputs[0].array.tolist()] == list(contents.values())
    assert not request.binary_output


@pytest.mark.parametrize(
    ("datatype", "contents"),
    [
        ("INT8", {"int_contents": [128]}), ("INT16", {"int_contents": [-(1 << 15) - 1]}),
        ("UINT8", {"uint_contents": [256]}), ("UINT16", {"uint_contents": [1 << 16]}),
        ("FP32", {"fp64_contents": [0.5]}), ("UINT8", {"int_contents": [1]}), ("INT64", {"int_contents": [1]}),
        ("FP32", {"fp32_contents": [0.5], "int_contents": [1]}),
        ("FP32", {"fp32_contents": [0.5, 0.5]}), ("FP32", {}), ("BYTES", {"bytes_contents": []}),
        ("FP16", {"fp32_contents": [0.5]}), ("BF16", {"uint_contents": [1]}), ("FLOAT", {"fp32_contents": [0.5]}),
    ],
)  # fmt: skip
def test_typed_contents_that_are_not_the_tensor_are_refused(datatype: str, contents: dict[str, Any]) -> None:
    with pytest.raises(InvalidTensor, match="'x'"):
        protobuf_body.decode_request(typed(datatype, [1], **contents))


def test_raw_and_typed_contents_never_mix() -> None:
    message = typed("UINT8", [1], uint_contents=[1])
    message.raw_input_contents.append(b"\1")
    with pytest.raises(InvalidRequest, match="got both"):
        protobuf_body.decode_request(message)


def test_raw_entries_are_as_many_as_tensors() -> None:
    with pytest.raises(InvalidRequest, match="expected one entry per input, 1, got 2"):
        protobuf_body.decode_request(raw("UINT8", [1], b"\1", b"\2"))


@pytest.mark.parametrize("content", [b"", b"\1\2\3", b"\1\2\3\4\5"])
def test_raw_bytes_of_another_size_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidTensor, match=f"expected 4 bytes.*got {len(content)}"):
        protobuf_body.decode_request(raw("FP32", [1], content))


@pytest.mark.parametrize("shape", [[1 << 62], [1 << 32, 1 << 32], [0, 1 << 62]])
def test_a_huge_shape_is_refused_as_too_large(shape: list[int]) -> None:
    for message in (raw("FP32", shape, b"\0\0\0\0"), typed("FP32", shape, fp32_contents=[0.5])):
        with pytest.raises(TooLarge, match="elements"):
            protobuf_body.decode_request(message)


@pytest.mark.parametrize("shape", [[-1], [1] * 9])
def test_a_shape_that_is_none_is_refused(shape: list[int]) -> None:
    with pytest.raises(InvalidTensor, match="dimensions"):
        protobuf_body.decode_request(raw("UINT8", shape, b"\1"))


def test_every_count_and_size_has_its_bound() -> None:
    limits = BodyLimits(max_tensors=1, max_parameters=1, max_body_bytes=8)
    twice = pb.ModelInferRequest(inputs=[Input(name="x"), Input(name="y")])
    with pytest.raises(TooLarge, match="inputs"):
        protobuf_body.decode_request(twice, limits=limits)
    outputs = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in "ab"]
    with pytest.raises(TooLarge, match="outputs"):
        protobuf_body.decode_request(pb.ModelInferRequest(outputs=outputs), limits=limits)
    with pytest.raises(TooLarge, match="at most 8 bytes, got 9"):
        protobuf_body.decode_request(raw("UINT8", [9], b"\0" * 9), limits=limits)
    with pytest.raises(TooLarge, match="at most 8 bytes"):
        protobuf_body.parse_request(b"\0" * 9, limits=limits)


@pytest.mark.parametrize(
    "parameter",
    [pb.InferParameter(), pb.InferParameter(double_param=float("nan")), pb.InferParameter(string_param="x" * 2000)],
)
def test_a_parameter_without_a_usable_value_is_refused(parameter: pb.InferParameter) -> None:
    message = raw("UINT8", [1], b"\1")
    message.parameters["a"].CopyFrom(parameter)
    with pytest.raises(InvalidRequest, match="'a'"):
        protobuf_body.decode_request(message)


def test_classification_is_refused_because_it_is_not_implemented() -> None:
    message = raw("UINT8", [1], b"\1")
    output = message.outputs.add(name="y")
    output.parameters["classification"].int64_param = 3
    with pytest.raises(InvalidRequest, match="'classification' is not supported"):
        protobuf_body.decode_request(message)


def test_a_message_without_inputs_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        protobuf_body.decode_request(pb.ModelInferRequest(model_name="digits"))


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="ModelInferRequest"):
        protobuf_body.parse_request(b"\xff\xff")
    with pytest.raises(InvalidRequest, match="ModelInferResponse"):
        protobuf_body.parse_response(b"\xff\xff")


def test_an_answer_is_raw_or_typed_as_asked() -> None:
    response = response_of(Datatype.FP32, np.array([0.5], np.float32))
    assert protobuf_body.encode_response(response, raw=True).raw_output_contents == [b"\0\0\0\x3f"]
    answer = protobuf_body.encode_response(response, raw=False)
    assert answer.outputs[0].contents.fp32_contents == [0.5]
    assert not answer.raw_output_contents


@pytest.mark.parametrize("datatype", [Datatype.FP16, Datatype.BF16])
def test_half_precision_forces_a_raw_answer(datatype: Datatype) -> None:
    dtype = np.float16 if datatype is Datatype.FP16 else np.uint16
    answer = protobuf_body.encode_response(response_of(datatype, np.zeros(1, dtype)), raw=False)
    assert answer.raw_output_contents == [b"\0\0"]
    assert not answer.outputs[0].HasField("contents")


def test_metadata_carries_variable_dimensions() -> None:
    spec = TensorSpec("x", Datatype.FP32, (-1, 64))
    message = protobuf_body.encode_metadata(
        ModelMetadata("digits", ("1",), "onnx_onnxv1", (spec,), (spec,), {"a": "b"})
    )
    assert list(message.inputs[0].shape) == [-1, 64]
    assert (message.inputs[0].datatype, list(message.versions), dict(message.properties)) == ("FP32", ["1"], {"a": "b"})
