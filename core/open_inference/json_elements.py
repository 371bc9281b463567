"""Arrays <-> the `data` of a JSON tensor: a flat or nested list in row-major order.

Which elements fit, exactly and without any conversion that loses something:

    BOOL true, false · integers a number in range, without fraction · FP32, FP64 a number in range · BYTES a string

FP16 and BF16 have no JSON form, nor has a number that is not finite.
"""

from itertools import chain
from typing import cast

import numpy as np

from core.errors import InvalidRequest, InvalidTensor
from core.open_inference.bounds import quoted
from core.tensors import NUMPY_DTYPE, Array, Datatype, Shape, Tensor

_NUMBERS = frozenset({float, int})
_ELEMENT_TYPES: dict[Datatype, frozenset[type]] = {
    Datatype.BOOL: frozenset({bool}),
    **dict.fromkeys((Datatype.UINT8, Datatype.UINT16, Datatype.UINT32, Datatype.UINT64), frozenset({int})),
    **dict.fromkeys((Datatype.INT8, Datatype.INT16, Datatype.INT32, Datatype.INT64), frozenset({int})),
    **dict.fromkeys((Datatype.FP32, Datatype.FP64), _NUMBERS),
    Datatype.BYTES: frozenset({str}),
}


def array_from_elements(where: str, datatype: Datatype, *, shape: Shape, count: int, elements: object) -> Array:
    """Return `elements` as an array of `shape`, which has `count` elements.

    Raises:
        InvalidTensor: their number, nesting, type or range is not that of the tensor.
    """
    allowed = _ELEMENT_TYPES.get(datatype)
    if allowed is None:
        raise InvalidTensor(f"{where}: {datatype} cannot travel as JSON; send it as binary data")
    if type(elements) is not list:
        raise InvalidTensor(f"{where}: expected data as an array, got {_json_type(type(elements))}")
    if elements and type(elements[0]) is list:
        elements = _flattened(where, shape, elements)
    if len(elements) != count:
        raise InvalidTensor(f"{where}: expected {count} elements for shape {list(shape)}, got {len(elements)}")
    # One pass in C; numpy on its own would turn true into 1.0, "1.5" into 1.5, null into NaN and 1.5 into 1.
    if not allowed.issuperset(map(type, elements)):
        wrong = next(kind for kind in map(type, elements) if kind not in allowed)
        raise InvalidTensor(f"{where}: expected {datatype} elements, got {_json_type(wrong)}")
    if datatype is Datatype.BYTES:
        return bytes_array(list(map(str.encode, cast("list[str]", elements))), shape)
    return _numbers(where, datatype, elements).reshape(shape)


def elements_of(tensor: Tensor) -> Array | list[str]:
    """Return the elements, flat, as orjson takes them. Whether floats are finite is for the caller to check."""
    if tensor.datatype not in _ELEMENT_TYPES:
        raise InvalidRequest(
            f"tensor {quoted(tensor.name)}: {tensor.datatype} cannot travel as JSON; ask for it as binary data"
        )
    flat = tensor.array.reshape(-1)
    if tensor.datatype is not Datatype.BYTES:
        return flat
    try:
        return [element.decode() for element in flat]
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"tensor {quoted(tensor.name)}: its BYTES are not UTF-8, as JSON needs; ask for it as binary data"
        ) from error


def bytes_array(elements: list[bytes], shape: Shape) -> Array:
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def _flattened(where: str, shape: Shape, nested: list[object]) -> list[object]:
    rows: list[list[object]] = [nested]
    for dimension in shape:
        if set(map(type, rows)) - {list}:
            raise InvalidTensor(f"{where}: expected data that is flat or nested like shape {list(shape)}")
        lengths = set(map(len, rows))
        if lengths - {dimension}:
            raise InvalidTensor(
                f"{where}: expected data nested like shape {list(shape)}, got {(lengths - {dimension}).pop()} elements "
                f"where {dimension} belong"
            )
        rows = list(chain.from_iterable(rows))  # type: ignore[arg-type]  # checked by the next round or the caller
    return rows  # type: ignore[return-value]  # after the last dimension the rows are the elements


def _numbers(where: str, datatype: Datatype, elements: list[object]) -> Array:
    try:
        with np.errstate(over="raise"):
            return np.array(elements, dtype=NUMPY_DTYPE[datatype])
    except (OverflowError, FloatingPointError) as error:
        raise InvalidTensor(f"{where}: expected numbers in the range of {datatype}, got one outside") from error


def _json_type(kind: type) -> str:
    names = {
        dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer",
        float: "a number with a fraction", type(None): "nothing",
    }  # fmt: skip
    return names.get(kind, kind.__name__)
