"""The difference between two chunks of weights, and plain compression: what travels to agents instead of the bytes.

Training moves most weights a little. In an int8 model a few percent of the bytes change, nearly all by one step; in a
float model every value changes in its low bits. So a chunk is read as integers of `width` bytes (the bit patterns of
floats are ordered like their magnitudes), the source's are subtracted, and the rest, zigzag coded (0, -1, 1, -2 … to
0, 1, 2, 3 …), is written in whichever form is smallest:

    SPARSE    gaps between the non-zeros, then their values: the gap's high part as bytes (255: more follows), its
              `shift` low bits, which are noise, as planes of bits
    PLANES    byte plane after byte plane: the high planes are nearly empty
    GROUPED   the same, after sorting by the exponent of the source's value: a step of training is of one absolute size,
              so the size of the rest depends on the exponent

Every section is raw, a Zstandard frame or, when values are only -1 and 1, bits. Layout, little-endian: the header
`_HEADER`, the sections (each `_SECTION` and its content), then the last bytes of a target that is no multiple of the
width. Source and target may differ in size: a source that is too short counts as zeros from there on.

Everything here may come from anybody. A decoder checks each length before it allocates, needs memory of a few times
`size_bytes` whatever it is fed, and raises IntegrityError on all that is not a whole encoding.
"""

import struct
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from core.errors import IntegrityError

FORMAT = 1
WIDTHS = (1, 2, 4, 8)
# Format, form, width, shift, number of values that changed (SPARSE) or 0.
_HEADER = struct.Struct("<BBBBI")
# Kind, encoded bytes.
_SECTION = struct.Struct("<BI")
_ESCAPE = 255
_MAX_SHIFT = 24
# Chosen: above it the gaps cost more than what they leave out (a byte a gap against a byte a value).
_MAX_SPARSE_RATIO = 0.3
# Measured on MiniLM: on differences level 19 is 5 % smaller than 9. On whole weights everything above 1 gains less than
# 1 %, and 19 takes twenty times as long as 12; the rest of a bundle (graphs, vocabularies) gains up to there.
_BEST_LEVEL = 19
_PLAIN_LEVEL = 12
_PROBE_LEVEL = 1

_Integers = npt.NDArray[np.unsignedinteger[Any]]
_Bytes = npt.NDArray[np.uint8]


class _Form(IntEnum):
    SPARSE = 1
    PLANES = 2
    GROUPED = 3


class _Kind(IntEnum):
    RAW = 0
    ZSTD = 1
    # One bit a value, 0 for 1 and 1 for 2: zigzag for -1 and 1.
    BITS = 2


# ---- plain ----------------------------------------------------------------------------------------------------------


def compress(data: bytes) -> bytes:
    """Return `data` as one Zstandard frame that states its size."""
    return _compressed(data, _PLAIN_LEVEL)


def decompress(encoded: bytes | memoryview, *, size_bytes: int) -> bytes:
    """Return the `size_bytes` bytes in a frame.

    Raises:
        IntegrityError: not one whole frame of that size.
    """
    try:
        # Stated by the frame itself, and allocated as stated: so it is looked at first.
        stated = zstandard.frame_content_size(encoded)
        if stated != size_bytes or not size_bytes:
            raise IntegrityError(f"frame: expected {size_bytes} bytes, got one of {stated}; fetch it again")
        decoder = zstandard.ZstdDecompressor()
        return decoder.decompress(encoded, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"frame: expected Zstandard, got {error}; fetch it again") from error


# ---- encoding -------------------------------------------------------------------------------------------------------


def encode_difference(source: bytes, target: bytes, *, width: int) -> bytes:
    """Return what makes `target` of `source`, seen as integers of `width` bytes: 1 for int8, 2, 4, 8 for floats."""
    if width not in WIDTHS:
        raise ValueError(f"expected a width among {WIDTHS}, got {width}")
    count = len(target) // width
    before = _integers(source, width, count)
    after = np.frombuffer(target, f"<u{width}", count)
    rest = _zigzag(after - before)
    positions = np.flatnonzero(rest)
    if len(positions) <= _MAX_SPARSE_RATIO * count:
        body = _sparse(rest, positions, width)
    else:
        body = _dense(rest, before, width)
    return body + target[count * width :]


def _sparse(rest: _Integers, positions: npt.NDArray[np.intp], width: int) -> bytes:
    gaps = np.diff(positions, prepend=-1) - 1
    # A high part of about 32 on average: few escapes, and bits below that are noise.
    shift = max(int(gaps.mean() + 1).bit_length() - 6, 0) if len(gaps) else 0
    low_bits = [np.packbits((gaps >> bit & 1).astype(np.uint8)).tobytes() for bit in range(shift)]
    sections = [_section(_escaped(gaps >> shift)), b"".join(low_bits), _values(rest[positions], width)]
    return _HEADER.pack(FORMAT, _Form.SPARSE, width, shift, len(positions)) + b"".join(sections)


def _escaped(numbers: npt.NDArray[np.int64]) -> bytes:
    """Return each number as its quotient by 255 times 255, then its remainder."""
    ends = np.cumsum(numbers // _ESCAPE + 1)
    digits = np.full(ends[-1] if len(ends) else 0, _ESCAPE, dtype=np.uint8)
    digits[ends - 1] = numbers % _ESCAPE
    return digits.tobytes()


def _values(values: _Integers, width: int) -> bytes:
    if len(values) and int(values.max()) <= 2:
        content = np.packbits((values == 2).astype(np.uint8)).tobytes()
        return _SECTION.pack(_Kind.BITS, len(content)) + content
    return b"".join(map(_section, _planes(values, width)))


def _dense(rest: _Integers, before: _Integers, width: int) -> bytes:
    candidates = {_Form.PLANES: _planes(rest, width)}
    if width > 1:
        candidates[_Form.GROUPED] = _planes(rest[_by_exponent(before, width)], width)
    sizes = {form: sum(len(_compressed(plane, _PROBE_LEVEL)) for plane in found) for form, found in candidates.items()}
    form = min(sizes, key=sizes.__getitem__)
    return _HEADER.pack(FORMAT, form, width, 0, 0) + b"".join(map(_section, candidates[form]))


def _section(content: bytes) -> bytes:
    """Return a section with `content`, compressed when that helps."""
    kind, written = _Kind.RAW, content
    # Nothing is gained from trying hard on noise, and most of the low planes are.
    if content and len(_compressed(content, _PROBE_LEVEL)) < 0.99 * len(content):
        best = _compressed(content, _BEST_LEVEL)
        if len(best) < len(content):
            kind, written = _Kind.ZSTD, best
    return _SECTION.pack(kind, len(written)) + written


def _compressed(content: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(content)


# ---- decoding -------------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
    form: _Form
    width: int
    shift: int
    changed: int


class _Reader:
    """Takes the parts of an encoding one after the other, never past its end."""

    def __init__(self, encoded: bytes | memoryview) -> None:
        self._left = memoryview(encoded)

    def take(self, size_bytes: int) -> memoryview:
        if size_bytes > len(self._left):
            raise IntegrityError(f"difference: expected {size_bytes} more bytes, got {len(self._left)}; fetch it again")
        taken, self._left = self._left[:size_bytes], self._left[size_bytes:]
        return taken

    def header(self) -> _Header:
        number, form, width, shift, changed = _HEADER.unpack(self.take(_HEADER.size))
        if number != FORMAT:
            raise IntegrityError(
                f"difference: expected format {FORMAT}, got {number}; update the agent or fetch it raw"
            )
        if form not in tuple(_Form) or width not in WIDTHS or shift > _MAX_SHIFT:
            raise _malformed(f"form {form}, width {width}, shift {shift}")
        return _Header(_Form(form), width, shift, changed)

    def section(self) -> tuple[int, memoryview]:
        kind, size_bytes = _SECTION.unpack(self.take(_SECTION.size))
        return kind, self.take(size_bytes)

    def array(self, count: int) -> _Bytes:
        """Return a section of exactly `count` bytes."""
        return _opened(*self.section(), count)

    def require_end(self) -> None:
        if len(self._left):
            raise _malformed(f"{len(self._left)} bytes after the end")


def decode_difference(source: bytes, encoded: bytes | memoryview, *, size_bytes: int) -> bytes:
    """Return the target that `encode_difference` saw; `source` must be the same bytes as then.

    Another source gives other bytes and no error: compare the digest.

    Raises:
        IntegrityError: not an encoding of `size_bytes` bytes.
    """
    reader = _Reader(encoded)
    header = reader.header()
    count = size_bytes // header.width
    before = _integers(source, header.width, count)
    add = _add_sparse if header.form is _Form.SPARSE else _add_dense
    after = add(reader, header, before)
    tail = reader.take(size_bytes - count * header.width)
    reader.require_end()
    return after.tobytes() + tail


def _add_sparse(reader: _Reader, header: _Header, before: _Integers) -> _Integers:
    if header.changed > len(before):
        raise _malformed(f"{header.changed} values for {len(before)} places")
    positions = _positions(reader, header, len(before))
    values = _read_values(reader, header)
    after = before.copy()
    after[positions] += _unzigzag(values)
    return after


def _positions(reader: _Reader, header: _Header, size: int) -> npt.NDArray[np.int64]:
    """Read the gaps; return where the non-zeros are, ascending and all below `size`."""
    kind, content = reader.section()
    # An escape stands for 255 places at least, so there cannot be more of them.
    digits = _opened(kind, content, _stated(kind, content, most=header.changed + size // _ESCAPE))
    ends = np.flatnonzero(digits != _ESCAPE)
    if len(ends) != header.changed or (len(digits) and digits[-1] == _ESCAPE):
        raise _malformed(f"{len(ends)} gaps for {header.changed} values")
    positions = np.cumsum(digits, dtype=np.int64)[ends] << header.shift
    positions += np.cumsum(_low_bits(reader, header), dtype=np.int64)
    positions += np.arange(header.changed)
    if header.changed and positions[-1] >= size:
        raise _malformed(f"place {positions[-1]} of {size}")
    return positions


def _low_bits(reader: _Reader, header: _Header) -> npt.NDArray[np.int32]:
    low = np.zeros(header.changed, dtype=np.int32)
    for bit in range(header.shift):
        low |= _unpacked(reader.take((header.changed + 7) // 8), header.changed).astype(np.int32) << bit
    return low


def _read_values(reader: _Reader, header: _Header) -> _Integers:
    kind, content = reader.section()
    if kind != _Kind.BITS:
        first = _opened(kind, content, header.changed)
        return _joined([first, *(reader.array(header.changed) for _ in range(header.width - 1))], header.width)
    if len(content) != (header.changed + 7) // 8:
        raise _malformed(f"{len(content)} bytes of signs for {header.changed} values")
    values: _Integers = _unpacked(content, header.changed).astype(f"<u{header.width}")
    values += 1
    return values


def _add_dense(reader: _Reader, header: _Header, before: _Integers) -> _Integers:
    if header.shift or header.changed or (header.form is _Form.GROUPED and header.width == 1):
        raise _malformed(f"shift {header.shift}, count {header.changed} in form {header.form.name}")
    planes = [reader.array(len(before)) for _ in range(header.width)]
    rest = _unzigzag(_joined(planes, header.width))
    if header.form is _Form.PLANES:
        return before + rest
    order = _by_exponent(before, header.width)
    after = before.copy()
    after[order] += rest
    return after


def _stated(kind: int, content: memoryview, *, most: int) -> int:
    """Return how many bytes a section says it holds.

    Raises:
        IntegrityError: more than `most`.
    """
    try:
        stated = zstandard.frame_content_size(content) if kind == _Kind.ZSTD else len(content)
    except zstandard.ZstdError as error:
        raise _malformed(str(error)) from error
    if not 0 <= stated <= most:
        raise _malformed(f"a section of {stated} bytes, at most {most}")
    return stated


def _opened(kind: int, content: memoryview, size_bytes: int) -> _Bytes:
    if kind == _Kind.ZSTD:
        return np.frombuffer(decompress(content, size_bytes=size_bytes), np.uint8)
    if kind != _Kind.RAW or len(content) != size_bytes:
        raise _malformed(f"a section of kind {kind} with {len(content)} bytes, expected {size_bytes}")
    return np.frombuffer(content, np.uint8)


def _malformed(what: str) -> IntegrityError:
    return IntegrityError(f"difference: malformed ({what}); fetch it again")


# ---- integers -------------------------------------------------------------------------------------------------------


def _integers(content: bytes, width: int, count: int) -> _Integers:
    """Return the first `count` integers of `content`, and zeros where it is shorter."""
    if len(content) < count * width:
        content = content + bytes(count * width - len(content))
    return np.frombuffer(content, f"<u{width}", count)


def _zigzag(difference: _Integers) -> _Integers:
    signed = difference.view(difference.dtype.str.replace("u", "i"))
    return ((signed << 1) ^ (signed >> (8 * signed.itemsize - 1))).view(difference.dtype)


def _unzigzag(values: _Integers) -> _Integers:
    one = values.dtype.type(1)
    unzigzagged: _Integers = (values >> one) ^ (~(values & one) + one)
    return unzigzagged


def _planes(values: _Integers, width: int) -> list[bytes]:
    """Return the lowest bytes of all values, then the next, up to the highest."""
    columns = values.view(np.uint8).reshape(-1, width)
    return [columns[:, place].tobytes() for place in range(width)]


def _joined(planes: list[_Bytes], width: int) -> _Integers:
    columns = np.empty((len(planes[0]), width), dtype=np.uint8)
    for place, plane in enumerate(planes):
        columns[:, place] = plane
    joined: _Integers = np.frombuffer(columns, f"<u{width}")
    return joined


def _by_exponent(values: _Integers, width: int) -> npt.NDArray[np.intp]:
    """Return the order by the eight bits below the sign: the exponent of float32 and bfloat16, and its like."""
    eight = (values << values.dtype.type(1)) >> values.dtype.type(8 * width - 8)
    return np.argsort(eight.astype(np.uint8), kind="stable")


def _unpacked(content: memoryview, count: int) -> _Bytes:
    return np.unpackbits(np.frombuffer(content, np.uint8), count=count)
