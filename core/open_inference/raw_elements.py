"""Arrays <-> raw tensor bytes: little-endian, row-major; one byte per BOOL; BYTES as uint32 length and bytes each.

Source: Triton's extension "binary tensor data"; the raw contents of the protobuf form are the same bytes.
"""

import math
import struct

import numpy as np

from core.errors import InvalidTensor
from core.open_inference.json_elements import bytes_array
from core.open_inference.messages import BodyLimits
from core.tensors import NUMPY_DTYPE, Array, Datatype, Shape, Tensor

_LENGTH = struct.Struct("<I")
# Of these not every value of the right size is one.
_NOT_PLAIN = frozenset({Datatype.BOOL, Datatype.BYTES})


def array_from_raw(where: str, datatype: Datatype, *, shape: Shape, count: int, raw: bytes | memoryview) -> Array:
    """Return `raw` as an array of `shape`, which has `count` elements: a read-only view of it where possible.

    Raises:
        InvalidTensor: the number of bytes is not that of the tensor, or they are no such values.
    """
    if datatype is Datatype.BYTES:
        return bytes_array(_split(where, count, raw), shape)
    dtype = NUMPY_DTYPE[datatype]
    if len(raw) != count * dtype.itemsize:
        raise InvalidTensor(
            f"{where}: expected {count * dtype.itemsize} bytes for {datatype} of shape {list(shape)}, got {len(raw)}"
        )
    if datatype is Datatype.BOOL and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise InvalidTensor(f"{where}: expected bytes 0 or 1 for BOOL, got a larger one")
    array = np.frombuffer(raw, dtype).reshape(shape)
    # Behind a JSON header the bytes start anywhere; compute kernels may rely on alignment.
    return array if array.flags.aligned else array.copy()


def array_if_plain(datatype: Datatype | None, shape: Shape, raw: bytes, limits: BodyLimits) -> Array | None:
    """Return the array of a tensor of numbers whose shape and size are as they should be; None: look closer.

    For what most requests have: `array_from_raw`, behind the checks of `bounds`, comes to the same or says why not.
    """
    if datatype is None or datatype in _NOT_PLAIN or len(shape) > limits.max_dimensions:
        return None
    dtype = NUMPY_DTYPE[datatype]
    count = math.prod(shape)
    if count * dtype.itemsize != len(raw) or not shape or min(shape) <= 0 or count > limits.max_elements:
        return None
    array = np.frombuffer(raw, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def raw_of(tensor: Tensor) -> bytes:
    if tensor.datatype is not Datatype.BYTES:
        return tensor.array.tobytes()
    return b"".join(piece for element in tensor.array.flat for piece in (_LENGTH.pack(len(element)), element))


def _split(where: str, count: int, raw: bytes | memoryview) -> list[bytes]:
    if len(raw) < count * _LENGTH.size:
        raise InvalidTensor(
            f"{where}: expected at least {count * _LENGTH.size} bytes for {count} BYTES elements, got {len(raw)}"
        )
    elements: list[bytes] = []
    offset = 0
    for number in range(count):
        start = offset + _LENGTH.size
        end = start + _LENGTH.unpack_from(raw, offset)[0] if start <= len(raw) else start
        if end > len(raw):
            raise InvalidTensor(f"{where}: element {number} of {count} ends at byte {end}, but only {len(raw)} came")
        elements.append(bytes(raw[start:end]))
        offset = end
    if offset != len(raw):
        raise InvalidTensor(f"{where}: expected {count} BYTES elements in {offset} bytes, got {len(raw)} bytes")
    return elements
