"""The JSON document that is a JSON body, or the header of a binary-tensor body.

Decoding: `parse` bounds depth, values and members on the raw bytes before the parser sees them; `decode_request`
or `decode_response` walks the document. Tensor bytes behind it come from a `RawTail`, which a JSON body does not have.
Encoding: `encode_tensor` makes one entry, `dump` the bytes. orjson writes a number that is not finite as `null`, so
`dump` looks for that word and only then for its cause.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import orjson

from core.errors import InternalError, InvalidRequest, InvalidTensor, NanofleetError
from core.open_inference.bounds import (
    checked_datatype,
    checked_flag,
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
from core.open_inference.json_elements import array_from_elements, elements_of
from core.open_inference.messages import BodyLimits, InferRequest, InferResponse, Parameters, RequestedOutput
from core.open_inference.raw_elements import array_from_raw
from core.tensors import Datatype, Tensor

Document = dict[str, Any]

BINARY_DATA_OUTPUT = "binary_data_output"
BINARY_DATA_SIZE = "binary_data_size"
_BINARY_DATA = "binary_data"

# For the check of the structure both kinds of bracket are one, and all else but quotes, colons and commas goes.
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'[]{}":,'))
# Chosen: the pieces of one block, each an object, stay small beside the body.
_BLOCK_BYTES = 1 << 16


class RawTail:
    """The tensor bytes behind a JSON header; every tensor takes its own, in order."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._offset = 0

    def take(self, where: str, size_bytes: object) -> memoryview:
        left = len(self._raw) - self._offset
        if type(size_bytes) is not int or not 0 <= size_bytes <= left:
            raise InvalidTensor(
                f"{where}: expected a {BINARY_DATA_SIZE} of 0 to the {left} bytes left, got {quoted(size_bytes)}"
            )
        start, self._offset = self._offset, self._offset + size_bytes
        return self._raw[start : self._offset]

    def require_empty(self) -> None:
        if self._offset != len(self._raw):
            raise InvalidRequest(f"body: expected {self._offset} bytes of tensors, got {len(self._raw)}")


def parse(body: bytes | memoryview, limits: BodyLimits) -> Document:
    """Return the JSON object in `body`.

    Raises:
        TooLarge: more bytes, values or members than the limits allow.
        InvalidRequest: nested too deep, not JSON, or not an object.
    """
    require_size(len(body), limits)
    _require_bounded_structure(bytes(body), limits)
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"body: expected JSON, got {error}") from error
    if type(document) is not dict:
        raise InvalidRequest("body: expected a JSON object")
    return document


def decode_request(
    document: Document, *, model_name: str, model_version: str, tail: RawTail | None, limits: BodyLimits
) -> InferRequest:
    parameters = _object(document, "parameters")
    return InferRequest(
        model_name,
        checked_tensors("inputs", _decode_tensors(document, "input", tail=tail, limits=limits)),
        model_version,
        _optional_text(document, "id", limits),
        checked_parameters(parameters.items(), limits, drop=BINARY_DATA_OUTPUT),
        _decode_outputs(document, limits),
        bool(checked_flag(f"parameter {BINARY_DATA_OUTPUT!r}", parameters.get(BINARY_DATA_OUTPUT))),
    )


def decode_response(document: Document, *, tail: RawTail | None, limits: BodyLimits) -> InferResponse:
    return InferResponse(
        checked_text("model_name", document.get("model_name"), limits),
        _optional_text(document, "model_version", limits),
        checked_tensors("outputs", _decode_tensors(document, "output", tail=tail, limits=limits)),
        _optional_text(document, "id", limits),
        checked_parameters(_object(document, "parameters").items(), limits),
    )


def request_head(request: InferRequest, *, binary_output: bool) -> Document:
    """Return the document of a request without its inputs."""
    document: Document = {"id": request.id} if request.id else {}
    if request.parameters or binary_output:
        document["parameters"] = dict(request.parameters)
        if binary_output:
            document["parameters"][BINARY_DATA_OUTPUT] = True
    if request.outputs:
        document["outputs"] = [_encode_output(output) for output in request.outputs]
    return document


def response_head(response: InferResponse) -> Document:
    """Return the document of a response without its outputs."""
    document: Document = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    return document


def encode_tensor(tensor: Tensor) -> Document:
    """Return the entry of a tensor that travels as JSON elements."""
    return {
        "name": tensor.name,
        "shape": tensor.array.shape,
        "datatype": tensor.datatype.value,
        "data": elements_of(tensor),
    }


def encode_raw_tensor(tensor: Tensor, size_bytes: int) -> Document:
    """Return the entry of a tensor whose bytes follow behind the document."""
    return {
        "name": tensor.name,
        "shape": tensor.array.shape,
        "datatype": tensor.datatype.value,
        "parameters": {BINARY_DATA_SIZE: size_bytes},
    }


def dump(document: Document, tensors: Sequence[Tensor], *, kind: str) -> bytes:
    """Return the bytes of a document in which `tensors` stand as elements.

    Raises:
        InternalError: an output is not finite, or the document has no JSON form.
        InvalidTensor: an input is not finite.
    """
    try:
        body = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:
        raise InternalError(f"body: it has no JSON form: {error}") from error
    if b"null" in body:
        _require_finite(tensors, kind)
    return body


def _require_finite(tensors: Sequence[Tensor], kind: str) -> None:
    blame: type[NanofleetError] = InvalidTensor if kind == "input" else InternalError
    for tensor in tensors:
        if tensor.datatype in (Datatype.FP32, Datatype.FP64) and not np.isfinite(tensor.array).all():
            raise blame(f"{kind} {quoted(tensor.name)}: JSON carries finite numbers only, got NaN or infinity")


def _require_bounded_structure(body: bytes, limits: BodyLimits) -> None:
    """Refuse what would make the parser recurse deep or allocate far more than the body's own size.

    Cheap for what is usual: counting what may stand in a text, too, gives upper bounds. No body is nested deeper than
    it has opening brackets, and every value but the first follows a comma or one of those.
    """
    opening = body.count(b"[") + body.count(b"{")
    if (
        opening <= limits.max_json_depth
        and opening + body.count(b",") <= limits.max_json_values
        and body.count(b":") <= limits.max_json_members
    ):
        return
    structure = _structure(body)
    brackets = structure.translate(None, b":,")
    require_count("body: JSON members", structure.count(b":"), limits.max_json_members)
    require_count("body: JSON values", structure.count(b",") + brackets.count(b"["), limits.max_json_values)
    for _ in range(limits.max_json_depth):
        # Takes away the innermost level everywhere: as many rounds as there are levels.
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return
    raise InvalidRequest(
        f"body: expected JSON nested at most {limits.max_json_depth} deep, got deeper or unbalanced brackets"
    )


def _structure(body: bytes) -> bytes:
    """Return the brackets, colons and commas outside of strings, every bracket as a square one."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Now every quote starts or ends a string. Two that meet are an empty string, or nothing between two strings.
    structure = body.translate(_AS_SQUARE, _NOT_STRUCTURE).replace(b'""', b"")
    outside: list[bytes] = []
    in_string = 0
    for start in range(0, len(structure), _BLOCK_BYTES):
        pieces = structure[start : start + _BLOCK_BYTES].split(b'"')
        outside.append(b"".join(pieces[in_string::2]))
        in_string = (in_string + len(pieces) - 1) % 2
    return b"".join(outside)


def _object(document: Document, key: str) -> Mapping[str, object]:
    value = document.get(key)
    if value is None:
        return {}
    if type(value) is not dict:
        raise InvalidRequest(f"{key}: expected an object, got {quoted(value)}")
    return value


def _optional_text(document: Document, key: str, limits: BodyLimits) -> str:
    value = document.get(key)
    return "" if value is None else checked_text(key, value, limits)


def _entries(document: Document, key: str, limits: BodyLimits) -> list[Document]:
    entries = document.get(key)
    if type(entries) is not list:
        raise InvalidRequest(f"{key}: expected an array, got {'nothing' if entries is None else quoted(entries)}")
    require_count(key, len(entries), limits.max_tensors)
    if not all(type(entry) is dict for entry in entries):
        raise InvalidRequest(f"{key}: expected objects only")
    return entries


def _decode_tensors(document: Document, kind: str, *, tail: RawTail | None, limits: BodyLimits) -> tuple[Tensor, ...]:
    entries = _entries(document, f"{kind}s", limits)
    return tuple([_decode_tensor(entry, kind, tail=tail, limits=limits) for entry in entries])


def _decode_tensor(entry: Document, kind: str, *, tail: RawTail | None, limits: BodyLimits) -> Tensor:
    name = checked_text(f"{kind} name", entry.get("name"), limits)
    where = f"{kind} {quoted(name)}"
    datatype = checked_datatype(where, entry.get("datatype"))
    dimensions = entry.get("shape")
    if type(dimensions) is not list:
        raise InvalidTensor(f"{where}: expected a shape as an array, got {quoted(dimensions)}")
    shape, count = checked_shape(where, dimensions, limits)
    size_bytes = _object(entry, "parameters").get(BINARY_DATA_SIZE) if "parameters" in entry else None
    if size_bytes is None:
        elements = entry.get("data")
        return Tensor(name, datatype, array_from_elements(where, datatype, shape=shape, count=count, elements=elements))
    if "data" in entry or tail is None:
        raise InvalidTensor(f"{where}: expected data or, in a binary-tensor body, {BINARY_DATA_SIZE}; not the other")
    raw = tail.take(where, size_bytes)
    return Tensor(name, datatype, array_from_raw(where, datatype, shape=shape, count=count, raw=raw))


def _decode_outputs(document: Document, limits: BodyLimits) -> tuple[RequestedOutput, ...]:
    if document.get("outputs") is None:
        return ()
    return checked_outputs(tuple(_decode_output(entry, limits) for entry in _entries(document, "outputs", limits)))


def _decode_output(entry: Document, limits: BodyLimits) -> RequestedOutput:
    name = checked_text("output name", entry.get("name"), limits)
    parameters = checked_parameters(_object(entry, "parameters").items(), limits)
    checked_output_parameters(name, parameters)
    return RequestedOutput(name, checked_flag(f"output {quoted(name)}: {_BINARY_DATA}", parameters.get(_BINARY_DATA)))


def _encode_output(output: RequestedOutput) -> Document:
    if output.binary is None:
        return {"name": output.name}
    return {"name": output.name, "parameters": cast("Parameters", {_BINARY_DATA: output.binary})}
