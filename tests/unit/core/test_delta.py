"""The codecs of chunks: what goes in comes out, differences of weights are small, and damage is noticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.delta import WIDTHS, compress, decode_difference, decompress, encode_difference
from core.errors import IntegrityError

CHUNKS = st.binary(max_size=4096)
widths = pytest.mark.parametrize("width", WIDTHS)


@widths
@given(source=CHUNKS, target=CHUNKS)
def test_any_chunk_comes_back_from_its_difference_to_any_other(source: bytes, target: bytes, width: int) -> None:
    encoded = encode_difference(source, target, width=width)
    assert decode_difference(source, encoded, size_bytes=len(target)) == target


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Return a chunk and the same with some bytes changed, a few of them far apart."""
    source = np.frombuffer(draw(st.randoms(use_true_random=False)).randbytes(draw(st.integers(1, 20_000))), np.uint8)
    target = source.copy()
    for place in draw(st.lists(st.integers(0, len(source) - 1), max_size=50)):
        target[place] = (int(target[place]) + draw(st.sampled_from([1, 255, 7]))) % 256
    return source.tobytes(), target.tobytes()


@widths
@given(pair=neighbours())
def test_a_chunk_comes_back_from_its_difference_to_a_similar_one(pair: tuple[bytes, bytes], width: int) -> None:
    source, target = pair
    encoded = encode_difference(source, target, width=width)
    assert decode_difference(source, encoded, size_bytes=len(target)) == target


@given(data=st.binary(min_size=1, max_size=4096))
def test_a_frame_gives_back_what_was_compressed(data: bytes) -> None:
    assert decompress(compress(data), size_bytes=len(data)) == data


@pytest.mark.parametrize("changed_ratio", [0.0001, 0.002, 0.02, 0.1])
def test_a_sparse_int8_difference_is_close_to_its_entropy(changed_ratio: float) -> None:
    generator = np.random.default_rng(1)
    source = generator.integers(0, 256, 1 << 20, dtype=np.uint8)
    steps = generator.choice(np.array([1, 255], np.uint8), len(source)) * (
        generator.random(len(source)) < changed_ratio
    )
    target = source + steps.astype(np.uint8)
    encoded = encode_difference(source.tobytes(), target.tobytes(), width=1)
    bits = -changed_ratio * np.log2(changed_ratio) - (1 - changed_ratio) * np.log2(1 - changed_ratio) + changed_ratio
    # Measured: 1.04 to 1.08; the header and a Huffman table weigh more on the smallest.
    assert len(encoded) <= 1.12 * bits * len(source) / 8 + 64
    assert decode_difference(source.tobytes(), encoded, size_bytes=len(target)) == target.tobytes()


def test_float_weights_that_moved_a_little_take_less_than_half() -> None:
    generator = np.random.default_rng(2)
    source = generator.normal(0, 0.05, 1 << 18).astype("<f4")
    target = source + generator.normal(0, 1e-5, len(source)).astype("<f4")
    encoded = encode_difference(source.tobytes(), target.tobytes(), width=4)
    assert len(encoded) < 0.5 * target.nbytes
    assert decode_difference(source.tobytes(), encoded, size_bytes=target.nbytes) == target.tobytes()


@pytest.mark.parametrize("width", [2, 4, 8])
def test_floats_that_are_no_numbers_come_back_bit_by_bit(width: int) -> None:
    source = np.array([0.0, 1.0, -1.0, np.inf, np.nan, -0.0, 1e-7] * 100, dtype=f"<f{width}")
    target = np.roll(source, 1)
    encoded = encode_difference(source.tobytes(), target.tobytes(), width=width)
    assert decode_difference(source.tobytes(), encoded, size_bytes=target.nbytes) == target.tobytes()


def test_an_unchanged_chunk_takes_a_few_bytes() -> None:
    assert len(encode_difference(bytes(1 << 20), bytes(1 << 20), width=4)) < 64


def test_other_widths_are_not_encoded() -> None:
    with pytest.raises(ValueError, match="expected a width"):
        encode_difference(b"abc", b"abd", width=3)


@widths
@given(source=CHUNKS, encoded=CHUNKS, size_bytes=st.integers(0, 8192), form=st.integers(0, 4))
def test_random_bytes_are_an_integrity_error_or_a_chunk_of_the_right_size(
    source: bytes, encoded: bytes, size_bytes: int, form: int, width: int
) -> None:
    for hostile in (encoded, bytes([1, form, width]) + encoded):
        try:
            decoded = decode_difference(source, hostile, size_bytes=size_bytes)
        except IntegrityError:
            continue
        assert len(decoded) == size_bytes


@widths
@given(
    pair=neighbours(),
    where=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    size_bytes=st.integers(0, 20_000),
)
def test_a_damaged_difference_is_an_integrity_error_or_a_chunk_of_the_right_size(
    pair: tuple[bytes, bytes], where: float, value: int, size_bytes: int, width: int
) -> None:
    source, target = pair
    damaged = bytearray(encode_difference(source, target, width=width))
    damaged[int(where * len(damaged))] = value
    for size in (len(target), size_bytes):
        try:
            decoded = decode_difference(source, bytes(damaged), size_bytes=size)
        except IntegrityError:
            continue
        assert len(decoded) == size


@widths
@given(pair=neighbours(), cut=st.floats(0, 1, exclude_max=True))
def test_a_cut_off_difference_is_an_integrity_error(pair: tuple[bytes, bytes], cut: float, width: int) -> None:
    source, target = pair
    encoded = encode_difference(source, target, width=width)
    with pytest.raises(IntegrityError):
        decode_difference(source, encoded[: int(cut * len(encoded))], size_bytes=len(target))


def test_bytes_after_the_end_are_an_integrity_error() -> None:
    encoded = encode_difference(b"before", b"after!", width=1)
    with pytest.raises(IntegrityError, match="after the end"):
        decode_difference(b"before", encoded + b"x", size_bytes=6)


def test_a_format_of_the_future_is_an_integrity_error_that_says_so() -> None:
    encoded = bytearray(encode_difference(b"before", b"after!", width=1))
    encoded[0] = 2
    with pytest.raises(IntegrityError, match="expected format 1, got 2"):
        decode_difference(b"before", bytes(encoded), size_bytes=6)


@given(encoded=CHUNKS, size_bytes=st.integers(0, 8192))
def test_random_bytes_are_no_frame(encoded: bytes, size_bytes: int) -> None:
    for hostile in (encoded, b"\x28\xb5\x2f\xfd" + encoded):
        try:
            decoded = decompress(hostile, size_bytes=size_bytes)
        except IntegrityError:
            continue
        assert len(decoded) == size_bytes


@pytest.mark.parametrize("size_bytes", [0, 9, 11])
def test_a_frame_of_another_size_is_an_integrity_error(size_bytes: int) -> None:
    with pytest.raises(IntegrityError, match="got one of 10"):
        decompress(compress(b"0123456789"), size_bytes=size_bytes)


def test_bytes_after_a_frame_are_an_integrity_error() -> None:
    with pytest.raises(IntegrityError):
        decompress(compress(b"0123456789") + b"x", size_bytes=10)
