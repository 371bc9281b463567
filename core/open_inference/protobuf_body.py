"""Messages <-> ModelInferRequest and ModelInferResponse, over gRPC or as an `application/protobuf` body.

Tensors travel raw (all of them, little-endian bytes beside the tensor's head) or typed (all of them, in the repeated
field of their datatype); FP16 and BF16 raw only. `InferRequest.binary_output` says that a request came raw, so that
the answer does too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from core.errors import InvalidRequest, InvalidTensor
from core.open_inference.bounds import (
    DATATYPES,
    checked_datatype,
    checked_output_parameters,
    checked_outputs,
    checked_parameters,
    checked_shape,
    checked_tensors,
    checked_text,
    quoted,
    require_count,
    require_size,
)
from core.open_inference.json_elements import bytes_array
from core.open_inference.messages import (
    DEFAULT_LIMITS,
    NO_PARAMETERS,
    BodyLimits,
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameters,
    RequestedOutput,
)
from core.open_inference.protobuf_bounds import REQUEST, RESPONSE, require_bounds
from core.open_inference.raw_elements import array_from_raw, array_if_plain, raw_of
from core.open_inference.statistics import Duration, ModelStatistics
from core.tensors import NUMPY_DTYPE, Array, Datatype, Tensor, TensorSpec
from protos.inference.v2 import open_inference_pb2 as pb

_TensorHead = pb.ModelInferRequest.InferInputTensor | pb.ModelInferResponse.InferOutputTensor

# The field of InferTensorContents in which the elements of a datatype stand.
_FIELDS: dict[Datatype, str] = {
    Datatype.BOOL: "bool_contents",
    **dict.fromkeys((Datatype.INT8, Datatype.INT16, Datatype.INT32), "int_contents"),
    Datatype.INT64: "int64_contents",
    **dict.fromkeys((Datatype.UINT8, Datatype.UINT16, Datatype.UINT32), "uint_contents"),
    Datatype.UINT64: "uint64_contents",
    Datatype.FP32: "fp32_contents",
    Datatype.FP64: "fp64_contents",
    Datatype.BYTES: "bytes_contents",
}
# Datatypes whose field is wider than they are.
_NARROW = {Datatype.INT8, Datatype.INT16, Datatype.UINT8, Datatype.UINT16}
_MAX_INT64 = (1 << 63) - 1
# Derived: two bytes of body take ninety of memory at most, so 90 kB, which the decoder then counts and refuses.
_HARMLESS_BYTES = 2000


def parse_request(body: bytes, *, limits: BodyLimits = DEFAULT_LIMITS) -> pb.ModelInferRequest:
    """Return the message in an `application/protobuf` body.

    Raises:
        TooLarge: more bytes, tensors, parameters or fields than the limits allow.
        InvalidRequest: not such a message.
    """
    require_size(len(body), limits)
    return parse_received_request(body, limits=limits)


def parse_received_request(body: bytes, *, limits: BodyLimits = DEFAULT_LIMITS) -> pb.ModelInferRequest:
    """Do as `parse_request` with a body whose size the transport has bounded, the heads of its tensors included."""
    try:
        if len(body) > _HARMLESS_BYTES:
            require_bounds(body, REQUEST, limits=limits)
        return pb.ModelInferRequest.FromString(body)
    except DecodeError as error:
        raise InvalidRequest("body: expected a ModelInferRequest message") from error


def parse_response(body: bytes, *, limits: BodyLimits = DEFAULT_LIMITS) -> pb.ModelInferResponse:
    """Return the message in an `application/protobuf` body; raises like `parse_request`."""
    require_size(len(body), limits)
    try:
        require_bounds(body, RESPONSE, limits=limits)
        return pb.ModelInferResponse.FromString(body)
    except DecodeError as error:
        raise InvalidRequest("body: expected a ModelInferResponse message") from error


def decode_request(message: pb.ModelInferRequest, *, limits: BodyLimits = DEFAULT_LIMITS) -> InferRequest:
    """Return the request in `message`. Its arrays may be views of the message's bytes.

    Raises:
        InvalidRequest: not a well-formed request; InvalidTensor where one tensor is at fault.
        TooLarge: over one of the limits.
    """
    require_count("outputs", len(message.outputs), limits.max_tensors)
    tensors = _decode_tensors("input", message.inputs, message.raw_input_contents, limits)
    return InferRequest(
        checked_text("model_name", message.model_name, limits),
        checked_tensors("inputs", tensors),
        checked_text("model_version", message.model_version, limits),
        checked_text("id", message.id, limits),
        _decode_parameters(message.parameters, limits),
        checked_outputs(tuple([_decode_output(output, limits) for output in message.outputs])),
        bool(message.raw_input_contents),
    )


def encode_request(request: InferRequest) -> pb.ModelInferRequest:
    """Return the message of `request`, raw."""
    return pb.ModelInferRequest(
        model_name=request.model_name,
        model_version=request.model_version,
        id=request.id,
        parameters=_encode_parameters(request.parameters),
        inputs=[
            pb.ModelInferRequest.InferInputTensor(
                name=tensor.name, datatype=tensor.datatype.value, shape=tensor.array.shape
            )
            for tensor in request.inputs
        ],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=output.name) for output in request.outputs],
        raw_input_contents=[raw_of(tensor) for tensor in request.inputs],
    )


def decode_response(message: pb.ModelInferResponse, *, limits: BodyLimits = DEFAULT_LIMITS) -> InferResponse:
    """Return the response in `message`; raises like `decode_request`."""
    tensors = _decode_tensors("output", message.outputs, message.raw_output_contents, limits)
    return InferResponse(
        checked_text("model_name", message.model_name, limits),
        checked_text("model_version", message.model_version, limits),
        checked_tensors("outputs", tensors),
        checked_text("id", message.id, limits),
        _decode_parameters(message.parameters, limits),
    )


def encode_response(response: InferResponse, *, raw: bool) -> pb.ModelInferResponse:
    """Return the message of `response`, raw or typed; one output without a typed form makes all of them raw."""
    raw = raw or any(output.datatype not in _FIELDS for output in response.outputs)
    return pb.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id,
        parameters=_encode_parameters(response.parameters),
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(
                name=tensor.name,
                datatype=tensor.datatype.value,
                shape=tensor.array.shape,
                contents=None if raw else _encode_contents(tensor),
            )
            for tensor in response.outputs
        ],
        raw_output_contents=[raw_of(tensor) for tensor in response.outputs] if raw else None,
    )


def encode_metadata(metadata: ModelMetadata) -> pb.ModelMetadataResponse:
    return pb.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=[_encode_spec(spec) for spec in metadata.inputs],
        outputs=[_encode_spec(spec) for spec in metadata.outputs],
        properties=metadata.properties,
    )


def encode_statistics(found: Sequence[ModelStatistics]) -> pb.ModelStatisticsResponse:
    return pb.ModelStatisticsResponse(model_stats=[_encode_model_statistics(each) for each in found])


def _encode_model_statistics(found: ModelStatistics) -> pb.ModelStatistics:
    return pb.ModelStatistics(
        name=found.name,
        version=found.version,
        last_inference=found.last_inference_ms,
        inference_count=found.success.count,
        execution_count=found.executions,
        inference_stats=pb.InferStatistics(
            success=_encode_duration(found.success),
            fail=_encode_duration(found.fail),
            queue=_encode_duration(found.queue),
            compute_infer=_encode_duration(found.compute_infer),
            cache_hit=_encode_duration(found.cache_hit),
            cache_miss=_encode_duration(found.cache_miss),
        ),
    )


def _encode_duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)


def _encode_spec(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype.value, shape=spec.shape)


def _decode_tensors(
    kind: str, heads: Sequence[_TensorHead], raws: Sequence[bytes], limits: BodyLimits
) -> tuple[Tensor, ...]:
    require_count(f"{kind}s", len(heads), limits.max_tensors)
    # Every access to an element of the message copies it, so take them once.
    raws = list(raws)
    if not raws:
        return tuple([_decode_typed(kind, head, limits) for head in heads])
    if len(raws) != len(heads):
        raise InvalidRequest(f"raw_{kind}_contents: expected one entry per {kind}, {len(heads)}, got {len(raws)}")
    require_size(sum(map(len, raws)), limits)
    return tuple([_decode_raw(kind, head, raw, limits) for head, raw in zip(heads, raws, strict=True)])


def _decode_raw(kind: str, head: _TensorHead, raw: bytes, limits: BodyLimits) -> Tensor:
    datatype = DATATYPES.get(head.datatype)
    array = array_if_plain(datatype, tuple(head.shape), raw, limits)
    if array is not None and datatype is not None and not head.HasField("contents"):
        return Tensor(checked_text("name", head.name, limits), datatype, array)
    return _decode_raw_closely(kind, head, raw, limits)


def _decode_raw_closely(kind: str, head: _TensorHead, raw: bytes, limits: BodyLimits) -> Tensor:
    name = checked_text(f"{kind} name", head.name, limits)
    where = f"{kind} {quoted(name)}"
    if head.HasField("contents") and head.contents.ListFields():
        raise InvalidRequest(f"{where}: expected raw or typed contents, got both")
    datatype = checked_datatype(where, head.datatype)
    shape, count = checked_shape(where, head.shape, limits)
    return Tensor(name, datatype, array_from_raw(where, datatype, shape=shape, count=count, raw=raw))


def _decode_typed(kind: str, head: _TensorHead, limits: BodyLimits) -> Tensor:
    name = checked_text(f"{kind} name", head.name, limits)
    where = f"{kind} {quoted(name)}"
    datatype = checked_datatype(where, head.datatype)
    shape, count = checked_shape(where, head.shape, limits)
    field = _FIELDS.get(datatype)
    if field is None:
        raise InvalidTensor(f"{where}: {datatype} has no typed contents; send it raw")
    for found, _ in head.contents.ListFields():
        if found.name != field:
            raise InvalidTensor(f"{where}: expected {datatype} in {field}, got {found.name}")
    elements = getattr(head.contents, field)
    if len(elements) != count:
        raise InvalidTensor(f"{where}: expected {count} elements for shape {list(shape)}, got {len(elements)}")
    if datatype is Datatype.BYTES:
        return Tensor(name, datatype, bytes_array(list(elements), shape))
    return Tensor(name, datatype, _numbers(where, datatype, elements, count).reshape(shape))


def _numbers(where: str, datatype: Datatype, elements: Sequence[Any], count: int) -> Array:
    try:
        return np.fromiter(elements, NUMPY_DTYPE[datatype], count)
    except OverflowError as error:
        raise InvalidTensor(f"{where}: expected numbers in the range of {datatype}, got one outside") from error


def _encode_contents(tensor: Tensor) -> pb.InferTensorContents:
    # A list is five times faster here than the array itself, whose elements would each become a numpy scalar.
    contents: dict[str, Any] = {_FIELDS[tensor.datatype]: tensor.array.reshape(-1).tolist()}
    return pb.InferTensorContents(**contents)


def _decode_output(message: pb.ModelInferRequest.InferRequestedOutputTensor, limits: BodyLimits) -> RequestedOutput:
    name = checked_text("output name", message.name, limits)
    if message.parameters:
        checked_output_parameters(name, _decode_parameters(message.parameters, limits))
    return RequestedOutput(name)


def _decode_parameters(parameters: Mapping[str, pb.InferParameter], limits: BodyLimits) -> Parameters:
    if not parameters:
        return NO_PARAMETERS
    require_count("parameters", len(parameters), limits.max_parameters)
    return checked_parameters([(name, _decode_parameter(value)) for name, value in parameters.items()], limits)


def _decode_parameter(value: pb.InferParameter) -> object:
    field = value.WhichOneof("parameter_choice")
    return None if field is None else getattr(value, field)


def _encode_parameters(parameters: Parameters) -> dict[str, pb.InferParameter] | None:
    if not parameters:
        return None
    return {name: _encode_parameter(value) for name, value in parameters.items()}


def _encode_parameter(value: bool | float | str) -> pb.InferParameter:
    match value:
        case bool():
            return pb.InferParameter(bool_param=value)
        case int():
            return pb.InferParameter(uint64_param=value) if value > _MAX_INT64 else pb.InferParameter(int64_param=value)
        case float():
            return pb.InferParameter(double_param=value)
        case str():
            return pb.InferParameter(string_param=value)
