"""A raw ModelInferResponse written as its bytes at once: quicker than building the message.

Only what a response of ours holds is written; `protobuf_body.encode_response` makes the same message, field by field,
and a test holds one against the other. Source: https://protobuf.dev/programming-guides/encoding/
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

from core.open_inference.messages import InferResponse, ParameterValue
from core.open_inference.raw_elements import raw_of
from core.tensors import Datatype, Shape

_DOUBLE = struct.Struct("<d")
# Field number and wire type: 2 is "length-delimited", 0 a varint, 1 eight bytes.
_NAME, _VERSION, _ID, _PARAMETER, _OUTPUT, _RAW = (bytes([number << 3 | 2]) for number in (1, 2, 3, 4, 5, 6))
_KEY, _VALUE = b"\x0a", b"\x12"
_BOOL, _INT64, _STRING, _DOUBLE_TAG, _UINT64 = b"\x08", b"\x10", b"\x1a", b"\x21", b"\x28"
_TENSOR_NAME, _TENSOR_DATATYPE, _TENSOR_SHAPE = b"\x0a", b"\x12", b"\x1a"
_MAX_INT64 = (1 << 63) - 1
_ALL_BITS = (1 << 64) - 1
# Chosen: names of models and outputs, and the words of parameters, which are few in one process.
_MAX_REMEMBERED = 1024


def raw_response_bytes(response: InferResponse) -> bytes:
    """Return the message of `response` with raw outputs."""
    pieces = [_field(_NAME, response.model_name), _field(_VERSION, response.model_version)]
    if response.id:
        pieces.append(_delimited(_ID, response.id.encode()))
    for name, value in response.parameters.items():
        pieces.append(_word(name, value) if type(value) is str else _parameter(name, value))
    raws: list[bytes] = []
    for tensor in response.outputs:
        pieces.append(_head(tensor.name, tensor.datatype, tensor.array.shape))
        raw = raw_of(tensor)
        raws += (_RAW, _varint(len(raw)), raw)
    return b"".join((*pieces, *raws))


def _delimited(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


@lru_cache(_MAX_REMEMBERED)
def _field(tag: bytes, text: str) -> bytes:
    return _delimited(tag, text.encode()) if text else b""


@lru_cache(_MAX_REMEMBERED)
def _head(name: str, datatype: Datatype, shape: Shape) -> bytes:
    dimensions = b"".join([_varint(dimension) for dimension in shape])
    head = _delimited(_TENSOR_NAME, name.encode()) if name else b""
    head += _delimited(_TENSOR_DATATYPE, datatype.value.encode())
    return _delimited(_OUTPUT, head + (_delimited(_TENSOR_SHAPE, dimensions) if shape else b""))


@lru_cache(_MAX_REMEMBERED)
def _word(name: str, text: str) -> bytes:
    return _entry(name, _delimited(_STRING, text.encode()))


def _parameter(name: str, value: ParameterValue) -> bytes:
    if isinstance(value, bool):
        return _entry(name, _BOOL + _varint(value))
    if isinstance(value, int):
        return _entry(name, _UINT64 + _varint(value) if value > _MAX_INT64 else _INT64 + _varint(value & _ALL_BITS))
    if isinstance(value, float):
        return _entry(name, _DOUBLE_TAG + _DOUBLE.pack(value))
    return _word(name, value)


def _entry(name: str, value: bytes) -> bytes:
    return _delimited(_PARAMETER, _field_always(_KEY, name) + _delimited(_VALUE, value))


@lru_cache(_MAX_REMEMBERED)
def _field_always(tag: bytes, text: str) -> bytes:
    return _delimited(tag, text.encode())


def _varint(number: int) -> bytes:
    if number < 128:
        return _SMALL[number]
    septets = []
    while number > 127:
        septets.append(number & 127 | 128)
        number >>= 7
    return bytes([*septets, number])


_SMALL: Sequence[bytes] = tuple(bytes([number]) for number in range(128))
