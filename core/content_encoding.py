"""Bodies as their Content-Encoding says (RFC 9110, section 8.4.1), decoded piece by piece within a bound.

A compressed body is inflated into what is left of the same bound that holds for a plain one, so a small body cannot
become a large one in memory.
"""

import zlib
from typing import Protocol

from core.errors import InvalidRequest

# `wbits` of zlib.decompressobj: 16 + 15 expects a gzip header, 15 a zlib one ("deflate").
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
ENCODINGS = "gzip, deflate or none"


class Decoder(Protocol):
    def feed(self, block: bytes, *, room_bytes: int) -> bytes:
        """Return decoded bytes; more than `room_bytes` of them means that the body does not fit."""
        ...

    def finish(self) -> None:
        """Raise InvalidRequest if the body ended too early."""
        ...


def decoder_of(encoding: str) -> Decoder | None:
    """Return what decodes a body of this Content-Encoding; None: nothing here does."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return _Identity()
    return _Inflater(encoding) if encoding in _WINDOW_BITS else None


class _Identity:
    def feed(self, block: bytes, *, room_bytes: int) -> bytes:
        return block

    def finish(self) -> None:
        return


class _Inflater:
    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._zlib = zlib.decompressobj(_WINDOW_BITS[encoding])

    def feed(self, block: bytes, *, room_bytes: int) -> bytes:
        try:
            inflated = self._zlib.decompress(block, room_bytes + 1)
        except zlib.error as error:
            raise InvalidRequest(f"body: expected {self._encoding}, as Content-Encoding says: {error}") from error
        if self._zlib.unused_data:
            raise InvalidRequest(f"body: expected the end of the {self._encoding} stream, got more bytes")
        return inflated

    def finish(self) -> None:
        if not self._zlib.eof:
            raise InvalidRequest(f"body: expected a whole {self._encoding} stream, got a truncated one")
