"""A20 and D11: what a poisoned delta or a decompression bomb can do to an agent: cost a bounded piece of memory."""

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from core.delta import decode_difference, decompress, encode_difference
from core.errors import IntegrityError
from core.manifest import MAX_CHUNK_BYTES

# The bound that is promised for decoding a chunk, beyond the chunk.
PROMISED_BYTES = 64 << 20
SOURCE = bytes(MAX_CHUNK_BYTES)
# 128 MiB of zeros in 4 KiB.
BOMB = zstandard.ZstdCompressor(level=3).compress(bytes(128 << 20))


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header(form: int, width: int, shift: int, changed: int) -> bytes:
    return struct.pack("<BBBBI", 1, form, width, shift, changed)


def section(kind: int, content: bytes) -> bytes:
    return struct.pack("<BI", kind, len(content)) + content


def frame(size_bytes: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size_bytes))


def sizeless_bomb() -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(128 << 20))


def lying_bomb() -> bytes:
    """Return a frame that states 1 MiB and holds 128 (RFC 8878, section 3.1.1: the size follows the descriptor)."""
    state = bytearray(BOMB)
    descriptor = state[4]
    assert descriptor >> 6 == 2, "expected a size of four bytes"
    at = 5 if descriptor & 0x20 else 6
    state[at : at + 4] = MAX_CHUNK_BYTES.to_bytes(4, "little")
    return bytes(state)


@pytest.mark.parametrize("bomb", [BOMB, sizeless_bomb(), lying_bomb()], ids=["honest", "sizeless", "lying"])
def test_A20_a_decompression_bomb_is_refused_within_bounded_memory(bomb: bytes) -> None:
    def attack() -> None:
        with pytest.raises(IntegrityError):
            decompress(bomb, size_bytes=MAX_CHUNK_BYTES)

    assert peak_of(attack) < 2 * MAX_CHUNK_BYTES


POISONED = {
    "a bomb for gaps": header(1, 1, 0, 1) + section(1, BOMB) + section(2, b"\0"),
    "a lying bomb for gaps": header(1, 1, 0, 1) + section(1, lying_bomb()) + section(2, b"\0"),
    "a bomb for a plane": header(2, 4, 0, 0) + section(1, BOMB) * 4,
    "more values than places": header(1, 1, 0, (1 << 32) - 1) + section(1, BOMB),
    "more bits than any number has": header(1, 1, 255, 8) + section(0, bytes(8)),
    "a place behind the end": header(1, 1, 24, 1) + section(0, b"\xfe") + b"\xff" * 24 + section(2, b"\0"),
    "escapes without an end": header(1, 1, 0, 0) + section(0, b"\xff"),
    "fewer gaps than values": header(1, 1, 0, 2) + section(0, b"\0") + section(2, b"\0"),
    "a section longer than all": header(2, 1, 0, 0) + struct.pack("<BI", 0, (1 << 32) - 1),
    "no such kind": header(2, 1, 0, 0) + section(7, bytes(MAX_CHUNK_BYTES)),
    "no such form": header(9, 1, 0, 0),
    "no such width": header(2, 3, 0, 0),
    "sorted bytes": header(3, 1, 0, 0) + section(0, bytes(MAX_CHUNK_BYTES)),
    "a plane that is too short": header(2, 2, 0, 0) + section(1, frame(7)) * 2,
}


@pytest.mark.parametrize("poisoned", POISONED.values(), ids=POISONED.keys())
def test_A20_a_poisoned_difference_is_refused_within_bounded_memory(poisoned: bytes) -> None:
    def attack() -> None:
        with pytest.raises(IntegrityError):
            decode_difference(SOURCE, poisoned, size_bytes=MAX_CHUNK_BYTES)

    assert peak_of(attack) < PROMISED_BYTES


# Everything at its largest: what passes every check and still costs most.
COSTLY = {
    "every byte changed, one by one": header(1, 1, 0, MAX_CHUNK_BYTES)
    + section(0, bytes(MAX_CHUNK_BYTES))
    + section(0, b"\1" * MAX_CHUNK_BYTES),
    "every byte changed, with low bits": header(1, 1, 24, MAX_CHUNK_BYTES)
    + section(1, frame(MAX_CHUNK_BYTES))
    + bytes(24 * MAX_CHUNK_BYTES // 8)
    + section(1, frame(MAX_CHUNK_BYTES)),
    "sorted floats": header(3, 8, 0, 0) + section(1, frame(MAX_CHUNK_BYTES // 8)) * 8,
    "sorted halves": header(3, 2, 0, 0) + section(1, frame(MAX_CHUNK_BYTES // 2)) * 2,
}


@pytest.mark.parametrize("costly", COSTLY.values(), ids=COSTLY.keys())
def test_D11_decoding_the_costliest_difference_keeps_its_memory_bound(costly: bytes) -> None:
    decoded = bytearray()
    peak_bytes = peak_of(lambda: decoded.extend(decode_difference(SOURCE, costly, size_bytes=MAX_CHUNK_BYTES)))
    assert len(decoded) == MAX_CHUNK_BYTES
    assert peak_bytes < PROMISED_BYTES


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_D11_decoding_with_a_modified_base_gives_bytes_that_the_digest_refuses(width: int) -> None:
    generator = np.random.default_rng(3)
    source = generator.bytes(1 << 16)
    target = generator.bytes(1 << 16)
    encoded = encode_difference(source, target, width=width)
    modified = bytes([source[0] ^ 1]) + source[1:]
    decoded = decode_difference(modified, encoded, size_bytes=len(target))
    assert len(decoded) == len(target)
    assert decoded != target
