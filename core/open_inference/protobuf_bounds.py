"""Counts what a protobuf body holds before the parser allocates for it.

Two bytes of body make an empty tensor, for which the parser takes ninety: only the wire format can be asked first. The
walk goes from field to field, descends into the messages named below, skips everything else (packed elements are one
field), allocates nothing and stops at the first excess.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from google.protobuf.message import DecodeError

from core.errors import TooLarge
from core.open_inference.bounds import require_count
from core.open_inference.messages import BodyLimits

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
# Tags are 32 bits wide: the parser refuses a wider one.
_MAX_TAG = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class _Repeated:
    """A field that may come up to `limit` times in its message; `fields` are those of the message that it holds."""

    name: str
    limit: Literal["max_tensors", "max_parameters", "max_dimensions"]
    fields: "_Fields | None" = None


@dataclass(frozen=True, slots=True)
class _Single:
    """A message of which the parser keeps one, however often it comes."""

    fields: "_Fields" = field(default_factory=lambda: _NO_FIELDS)


# By field number. What is not here is skipped, and counted as one field of the body.
_Fields: TypeAlias = Mapping[int, _Repeated | _Single]
_NO_FIELDS: _Fields = MappingProxyType({})
# InferParameter and InferTensorContents repeat no message, so that the number of their fields bounds them.
_PARAMETER: _Fields = {2: _Single()}
_TENSOR: _Fields = {
    3: _Repeated("shape", "max_dimensions"),
    4: _Repeated("parameters", "max_parameters", _PARAMETER),
    5: _Single(),
}
_OUTPUT: _Fields = {2: _Repeated("parameters", "max_parameters", _PARAMETER)}

REQUEST: _Fields = {
    4: _Repeated("parameters", "max_parameters", _PARAMETER),
    5: _Repeated("inputs", "max_tensors", _TENSOR),
    6: _Repeated("outputs", "max_tensors", _OUTPUT),
    7: _Repeated("raw_input_contents", "max_tensors"),
}
RESPONSE: _Fields = {
    4: _Repeated("parameters", "max_parameters", _PARAMETER),
    5: _Repeated("outputs", "max_tensors", _TENSOR),
    6: _Repeated("raw_output_contents", "max_tensors"),
}


def require_bounds(body: bytes, message: _Fields, *, limits: BodyLimits) -> None:
    """Return if parsing `body` as `message`, REQUEST or RESPONSE, takes memory within `limits`.

    Raises:
        TooLarge: more tensors, parameters, dimensions or fields than the limits allow.
        DecodeError: not the wire format of protobuf.
    """
    try:
        _Walk(body, limits).message(0, len(body), message)
    except IndexError as error:
        raise DecodeError("ends within a field") from error


class _Walk:
    """One pass over a body; what it counts over all messages is the number of their fields."""

    __slots__ = ("_body", "_fields_left", "_limits")

    def __init__(self, body: bytes, limits: BodyLimits) -> None:
        self._body = body
        self._limits = limits
        self._fields_left = limits.max_json_values

    def message(self, at: int, end: int, fields: _Fields) -> None:
        """Walk the message in `body[at:end]`. The depth of `fields` bounds the recursion."""
        body = self._body
        counts: dict[int, int] = {}
        while at < end:
            self._take_field()
            tag, at = body[at], at + 1
            if tag > 127:
                tag, at = self._varint(at - 1)
            start = at
            kind = tag & 7
            if kind == _DELIMITED:
                size, start = body[at], at + 1
                if size > 127:
                    size, start = self._varint(at)
                at = start + size
            else:
                at = self._skipped(at, kind)
            if at > end or tag > _MAX_TAG:
                raise DecodeError("a field longer than its message, or none of the protocol")
            rule = fields.get(tag >> 3)
            if rule is not None:
                self._check(rule, tag, start, at, counts)

    def _check(self, rule: _Repeated | _Single, tag: int, start: int, end: int, counts: dict[int, int]) -> None:
        is_delimited = tag & 7 == _DELIMITED
        if isinstance(rule, _Repeated):
            number = tag >> 3
            counts[number] = counts.get(number, 0) + _least_count(rule, end - start, is_delimited=is_delimited)
            require_count(rule.name, counts[number], getattr(self._limits, rule.limit))
        if is_delimited and rule.fields is not None:
            self.message(start, end, rule.fields)

    def _take_field(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise TooLarge(f"body: expected at most {self._limits.max_json_values} fields, got more; send tensors raw")

    def _varint(self, at: int) -> tuple[int, int]:
        """Return the number at `at` and where it ends."""
        value = 0
        for index in range(_MAX_VARINT_BYTES):
            byte = self._body[at + index]
            value |= (byte & 127) << (7 * index)
            if byte < 128:
                return value, at + index + 1
        raise DecodeError(f"a number of more than {_MAX_VARINT_BYTES} bytes")

    def _skipped(self, at: int, kind: int) -> int:
        if kind == _VARINT:
            return self._varint(at)[1]
        if kind == _FIXED64:
            return at + 8
        if kind == _FIXED32:
            return at + 4
        # 3 and 4 are groups, which proto3 does not have and whose nesting would have to be bounded.
        raise DecodeError(f"wire type {kind}")


def _least_count(rule: _Repeated, size_bytes: int, *, is_delimited: bool) -> int:
    if rule.limit == "max_dimensions" and is_delimited:
        # Packed: without reading them, at least so many. The decoder counts again.
        return -(-size_bytes // _MAX_VARINT_BYTES)
    return 1
