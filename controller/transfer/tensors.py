"""Where the tensors lie in an ONNX file: a scanner of its protobuf bytes that reads lengths and skips contents.

Only what leads to tensors is followed (`_INTO`), subgraphs and attributes of nodes too; nothing is copied but names, so
a file of gigabytes costs the pages of its graph. The file may be anybody's: every length is checked against what is
around it, depth and number of fields are bounded. Field numbers are those of onnx/onnx.proto, IR version 13.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

# Measured: 50,000 nodes with five attributes each have 1.35 million fields and take 1.5 s. Beyond: cut plainly.
MAX_FIELDS = 4_000_000
_MAX_DEPTH = 32
_MAX_NAME_BYTES = 1024

Buffer = bytes | memoryview


class Malformed(Exception):
    """Not the bytes of an ONNX model, or more than the scanner goes through; never leaves the package."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """The contents of a tensor: `size_bytes` at `offset` of the file, in elements of `width` bytes."""

    name: str
    offset: int
    size_bytes: int
    width: int


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A tensor in another file, named relative to the model's folder; None: to the end of that file."""

    name: str
    location: str
    offset: int
    size_bytes: int | None
    width: int


class _Message(Enum):
    MODEL = auto()
    GRAPH = auto()
    NODE = auto()
    ATTRIBUTE = auto()
    TENSOR = auto()


# Fields that lead to tensors.
_INTO = {
    _Message.MODEL: {7: _Message.GRAPH},
    _Message.GRAPH: {1: _Message.NODE, 5: _Message.TENSOR},
    _Message.NODE: {5: _Message.ATTRIBUTE},
    _Message.ATTRIBUTE: {5: _Message.TENSOR, 6: _Message.GRAPH, 10: _Message.TENSOR, 11: _Message.GRAPH},
}
# TensorProto: data_type, name, and where contents are: float_data, raw_data, double_data, external_data.
_DATA_TYPE, _NAME, _FLOATS, _RAW, _DOUBLES, _EXTERNAL = 2, 8, 4, 9, 10, 13
_CONTENT_WIDTHS = {_FLOATS: 4, _DOUBLES: 8}
# TensorProto.DataType to bytes an element; all others (8 bits, 4 bits, bool) are seen as bytes.
_WIDTHS = {1: 4, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 14: 4, 15: 8, 16: 2}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def tensors_of(content: Buffer) -> Iterator[Tensor | ExternalTensor]:
    """Yield the tensors with contents, in the order of the file.

    Raises:
        Malformed: not a model, or one that goes beyond the bounds.
    """
    return _Scanner(content).scan(0, len(content), _Message.MODEL, _MAX_DEPTH)


class _Scanner:
    def __init__(self, content: Buffer) -> None:
        self._content = content
        self._fields_left = MAX_FIELDS

    def scan(self, start: int, end: int, message: _Message, depth: int) -> Iterator[Tensor | ExternalTensor]:
        if not depth:
            raise Malformed("too deep")
        into = _INTO[message]
        for field, kind, value, size_bytes in self._fields(start, end):
            inner = into.get(field)
            if inner is None or kind != _BYTES:
                continue
            if inner is _Message.TENSOR:
                yield from self._tensor(value, value + size_bytes)
            else:
                yield from self.scan(value, value + size_bytes, inner, depth - 1)

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, wire type, value (of a varint) or offset (of bytes), and size of every field."""
        at = start
        while at < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise Malformed("too many fields")
            key, at = self._varint(at, end)
            field, kind = key >> 3, key & 7
            value, size_bytes = at, 0
            if kind == _VARINT:
                value, at = self._varint(at, end)
            elif kind == _BYTES:
                size_bytes, value = self._varint(at, end)
                at = value + size_bytes
            elif kind in (_FIXED32, _FIXED64):
                at += 4 if kind == _FIXED32 else 8
            else:
                raise Malformed(f"wire type {kind}")
            if at > end:
                raise Malformed("a field longer than its message")
            yield field, kind, value, size_bytes

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise Malformed("a number without an end")

    def _tensor(self, start: int, end: int) -> Iterator[Tensor | ExternalTensor]:
        name, data_type, entries, contents = "", 0, dict[str, str](), list[tuple[int, int, int]]()
        for field, kind, value, size_bytes in self._fields(start, end):
            if field == _DATA_TYPE and kind == _VARINT:
                data_type = value
            elif kind != _BYTES:
                continue
            elif field == _NAME:
                name = self._text(value, size_bytes)
            elif field == _EXTERNAL:
                entries.update([self._entry(value, value + size_bytes)])
            elif field in (_RAW, *_CONTENT_WIDTHS):
                contents.append((field, value, size_bytes))
        width = _WIDTHS.get(data_type, 1)
        for field, offset, size_bytes in contents:
            yield Tensor(name, offset, size_bytes, _CONTENT_WIDTHS.get(field, width))
        if "location" in entries:
            yield _external(name, entries, width)

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        """Return a StringStringEntryProto."""
        texts = {
            field: self._text(value, size_bytes)
            for field, kind, value, size_bytes in self._fields(start, end)
            if kind == _BYTES and field in (1, 2)
        }
        return texts.get(1, ""), texts.get(2, "")

    def _text(self, offset: int, size_bytes: int) -> str:
        if size_bytes > _MAX_NAME_BYTES:
            raise Malformed("a name that is too long")
        return bytes(self._content[offset : offset + size_bytes]).decode(errors="replace")


def _external(name: str, entries: dict[str, str], width: int) -> ExternalTensor:
    try:
        offset = int(entries.get("offset", "0"))
        size_bytes = int(entries["length"]) if "length" in entries else None
    except ValueError as error:
        raise Malformed("an external tensor without a place") from error
    return ExternalTensor(name, entries["location"], offset, size_bytes, width)
