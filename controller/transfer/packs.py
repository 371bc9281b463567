"""A pack: the encoded chunks of one variant in one file, in full or as differences to one other variant.

    header ─ index, one entry a chunk ─ SHA-256 of both ─ payloads

Reading a chunk is one pread. In a delta, a chunk that the source has already, or that is smallest as in the full pack,
is an entry without payload. A delta that saves too little is kept as a header that says so, and never built again.
The index is verified when a pack is opened; payloads are not, the receiver knows the digest of every chunk.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from core.digest import Digest, hex_of
from core.errors import IntegrityError
from core.manifest import MAX_CHUNK_BYTES

# Magic with the format's number, is it useless, chunks, target, source (zeros: in full).
_HEADER = struct.Struct("<8s?3xI32s32s")
_MAGIC = b"nfpack1\n"
_IN_FULL = bytes(32)
_SHA256_BYTES = 32
# Derived: a manifest lists no more chunks than fit into core.manifest.MAX_MANIFEST_BYTES.
_MAX_CHUNKS = 1 << 17
_ENTRY = np.dtype(
    [("form", "<u1"), ("source_index", "<u4"), ("plain_bytes", "<u4"), ("size_bytes", "<u4"), ("offset", "<u8")]
)


class Form(IntEnum):
    # The source has a chunk of the same digest.
    SAME = 0
    # As in the full pack.
    FULL = 1
    RAW = 2
    ZSTD = 3
    DIFFERENCE = 4


_WITH_PAYLOAD = (Form.RAW, Form.ZSTD, Form.DIFFERENCE)


class Payload(NamedTuple):
    """A chunk as a pack is told of it; `data` is empty for SAME and FULL."""

    form: Form
    plain_bytes: int
    data: bytes = b""
    source_index: int = 0


class Entry(NamedTuple):
    form: Form
    plain_bytes: int
    size_bytes: int
    source_index: int


@dataclass(frozen=True, slots=True)
class PackId:
    """What a pack is of; `source` is None for a full one."""

    target: Digest
    source: Digest | None = None

    def path(self, root: Path) -> Path:
        if self.source is None:
            return root / "full" / hex_of(self.target)
        return root / "delta" / hex_of(self.target) / hex_of(self.source)

    def header(self, *, count: int, is_useless: bool) -> bytes:
        source = _IN_FULL if self.source is None else bytes.fromhex(hex_of(self.source))
        return _HEADER.pack(_MAGIC, is_useless, count, bytes.fromhex(hex_of(self.target)), source)


def write_pack(path: Path, pack: PackId, payloads: Iterator[Payload], *, count: int) -> None:
    """Write the pack of `count` payloads to the new file `path`, payload by payload; nothing is held in memory."""
    head = pack.header(count=count, is_useless=False)
    index = np.zeros(count, _ENTRY)
    at = len(head) + index.nbytes + _SHA256_BYTES
    with path.open("xb") as file:
        file.seek(at)
        for number, payload in enumerate(payloads):
            index[number] = (payload.form, payload.source_index, payload.plain_bytes, len(payload.data), at)
            file.write(payload.data)
            at += len(payload.data)
        file.seek(0)
        file.write(_sealed(head + index.tobytes()))


def write_useless(path: Path, pack: PackId) -> None:
    """Write that this delta is not worth it."""
    with path.open("xb") as file:
        file.write(_sealed(pack.header(count=0, is_useless=True)))


def _sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


class PackFile:
    """An open pack; close it in the end. Not for several threads at a time."""

    def __init__(self, descriptor: int, index: npt.NDArray[Any], *, is_useless: bool) -> None:
        self._descriptor = descriptor
        self._index = index
        self.is_useless = is_useless

    @classmethod
    def open(cls, root: Path, pack: PackId) -> "PackFile":
        """Open and verify.

        Raises:
            FileNotFoundError: there is none.
            IntegrityError: it is damaged.
        """
        descriptor = os.open(pack.path(root), os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_useless, index = _read_index(descriptor, pack)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, index, is_useless=is_useless)

    def close(self) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._index)

    def entry(self, index: int) -> Entry:
        row = self._index[index]
        return Entry(Form(row["form"]), int(row["plain_bytes"]), int(row["size_bytes"]), int(row["source_index"]))

    def read(self, index: int) -> bytes:
        """Return the payload of a chunk.

        Raises:
            IntegrityError: the file became shorter.
        """
        row = self._index[index]
        size_bytes = int(row["size_bytes"])
        payload = os.pread(self._descriptor, size_bytes, int(row["offset"]))
        if len(payload) != size_bytes:
            raise _damaged(f"chunk {index} is cut off")
        return payload

    def has(self, form: Form) -> npt.NDArray[np.bool_]:
        """Return for each chunk whether its entry has this form."""
        return np.asarray(self._index["form"] == form)

    @property
    def encoded_sizes(self) -> npt.NDArray[np.uint64]:
        return self._index["size_bytes"].astype(np.uint64)

    @property
    def plain_bytes(self) -> int:
        return int(self._index["plain_bytes"].sum(dtype=np.uint64))


def _read_index(descriptor: int, pack: PackId) -> tuple[bool, npt.NDArray[Any]]:
    head = os.pread(descriptor, _HEADER.size, 0)
    if len(head) != _HEADER.size:
        raise _damaged("no header")
    _, is_useless, count, _, _ = _HEADER.unpack(head)
    if head != pack.header(count=count, is_useless=is_useless) or count > _MAX_CHUNKS:
        raise _damaged("the header of something else")
    sealed = os.pread(descriptor, _HEADER.size + count * _ENTRY.itemsize + _SHA256_BYTES, 0)
    if _sealed(sealed[:-_SHA256_BYTES]) != sealed:
        raise _damaged("index and its digest differ")
    index = np.frombuffer(sealed, _ENTRY, count, _HEADER.size)
    _require_within(index, os.fstat(descriptor).st_size)
    return is_useless, index


def _require_within(index: npt.NDArray[Any], file_bytes: int) -> None:
    """Raise IntegrityError unless every entry lies in the file: it may have been cut off behind the index."""
    sizes = index["size_bytes"]
    is_within = (index["offset"] <= file_bytes) & (sizes <= MAX_CHUNK_BYTES) & (index["form"] <= max(Form))
    if not np.all(is_within & (index["offset"] + sizes <= file_bytes)):
        raise _damaged("a chunk outside the file")


def _damaged(what: str) -> IntegrityError:
    return IntegrityError(f"pack: damaged ({what}); it is built again at the next preparation")
