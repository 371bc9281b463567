"""What every codec checks of a peer's message, whatever its wire format: counts, texts, shapes, parameters.

Each check runs before anything of the stated size is allocated. `where` in the messages is for example `input 'x'`.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import cast

from core.errors import InvalidRequest, InvalidTensor, TooLarge
from core.open_inference.messages import NO_PARAMETERS, BodyLimits, Parameters, ParameterValue, RequestedOutput
from core.tensors import Datatype, Shape, Tensor

DATATYPES: dict[object, Datatype] = {datatype.value: datatype for datatype in Datatype}
_PARAMETER_TYPES = (bool, int, float, str)
# What changes the meaning of an output, so that leaving it out would be a wrong answer.
_UNSUPPORTED_OUTPUT_PARAMETERS = ("classification", "shared_memory_region")
# An integer that fits into none of the protocol's parameter types cannot be handed on.
_MIN_INTEGER, _MAX_INTEGER = -(1 << 63), (1 << 64) - 1


def quoted(text: object) -> str:
    """Return text of a peer for an error message: quoted and bounded."""
    return repr(text[:80]) if isinstance(text, str) else f"{text!r:.80}"


def require_size(size_bytes: int, limits: BodyLimits) -> None:
    if size_bytes > limits.max_body_bytes:
        raise TooLarge(f"body: expected at most {limits.max_body_bytes} bytes, got {size_bytes}")


def require_count(where: str, count: int, limit: int) -> None:
    if count > limit:
        raise TooLarge(f"{where}: expected at most {limit}, got {count}")


def checked_text(where: str, value: object, limits: BodyLimits) -> str:
    if type(value) is not str:
        raise InvalidRequest(f"{where}: expected a string, got {type(value).__name__}")
    if len(value) > limits.max_text_chars:
        raise InvalidRequest(f"{where}: expected at most {limits.max_text_chars} characters, got {len(value)}")
    return value


def checked_datatype(where: str, value: object) -> Datatype:
    try:
        return DATATYPES[value]
    except (KeyError, TypeError):
        raise InvalidTensor(f"{where}: expected a datatype of {', '.join(Datatype)}; got {quoted(value)}") from None


def checked_shape(where: str, dimensions: Sequence[object], limits: BodyLimits) -> tuple[Shape, int]:
    """Return the shape and its number of elements, neither of them trusted before."""
    if len(dimensions) > limits.max_dimensions:
        raise InvalidTensor(f"{where}: expected at most {limits.max_dimensions} dimensions, got {len(dimensions)}")
    shape = tuple(dimensions)
    count, largest = 1, 0
    for dimension in shape:
        if type(dimension) is not int or dimension < 0:
            raise InvalidTensor(f"{where}: expected dimensions that are integers from 0, got {quoted(dimension)}")
        count *= dimension
        largest = max(largest, dimension)
    # A zero makes the product harmless, but numpy still refuses its huge neighbour.
    if max(count, largest) > limits.max_elements:
        raise TooLarge(f"{where}: expected at most {limits.max_elements} elements, got shape {quoted(list(shape))}")
    return cast("Shape", shape), count


def checked_parameters(
    items: Collection[tuple[object, object]] | None, limits: BodyLimits, *, drop: str | None = None
) -> Parameters:
    """Return parameters by name, without the one called `drop`."""
    if not items:
        return NO_PARAMETERS
    require_count("parameters", len(items), limits.max_parameters)
    return {name: value for name, value in _checked_items(items, limits) if name != drop}


def _checked_items(items: Iterable[tuple[object, object]], limits: BodyLimits) -> Iterable[tuple[str, ParameterValue]]:
    for key, value in items:
        name = checked_text("parameter name", key, limits)
        where = f"parameter {quoted(name)}"
        if type(value) not in _PARAMETER_TYPES:
            raise InvalidRequest(f"{where}: expected a boolean, number or string, got {type(value).__name__}")
        if isinstance(value, str):
            checked_text(where, value, limits)
        elif isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{where}: expected a finite number, got {value}")
        elif isinstance(value, int) and not _MIN_INTEGER <= value <= _MAX_INTEGER:
            raise InvalidRequest(f"{where}: expected an integer of at most 64 bits, got {quoted(value)}")
        yield name, cast("ParameterValue", value)


def checked_tensors(where: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return tensors, at least one and each name once."""
    if not tensors:
        raise InvalidRequest(f"{where}: expected at least one tensor, got none")
    _require_distinct(where, [tensor.name for tensor in tensors])
    return tensors


def checked_outputs(outputs: tuple[RequestedOutput, ...]) -> tuple[RequestedOutput, ...]:
    _require_distinct("outputs", [output.name for output in outputs])
    return outputs


def checked_output_parameters(name: str, parameters: Parameters) -> Parameters:
    for unsupported in _UNSUPPORTED_OUTPUT_PARAMETERS:
        if parameters.get(unsupported):
            raise InvalidRequest(f"output {quoted(name)}: {unsupported!r} is not supported; leave it out")
    return parameters


def checked_flag(where: str, value: object) -> bool | None:
    if value is not None and type(value) is not bool:
        raise InvalidRequest(f"{where}: expected true or false, got {quoted(value)}")
    return value


def _require_distinct(where: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidTensor(f"{where}: expected every name once, got {quoted(twice)} {names.count(twice)} times")
