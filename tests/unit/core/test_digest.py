"""Content digests: one spelling, the same however the bytes arrive."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.digest import Hasher, digest_of, digest_of_file, hex_of, parse_digest
from core.errors import IntegrityError, InvalidRequest
from tests.support.open_inference_strategies import PATIENT


def test_a_digest_is_sha256_in_lower_case_hexadecimal() -> None:
    digest = digest_of(b"abc")
    assert digest == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert parse_digest(digest) == digest
    assert "sha256:" + hex_of(digest) == digest


@pytest.mark.parametrize(
    "text",
    [
        "", "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "sha256:" + "a" * 65, "a" * 64, "md5:" + "a" * 64,
        "sha256:" + "a" * 64 + "\n", "sha256:../" + "a" * 61,
    ],
)  # fmt: skip
def test_any_other_spelling_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected sha256:"):
        parse_digest(text)


@PATIENT
@given(st.lists(st.binary()))
def test_pieces_have_the_digest_of_the_whole(pieces: list[bytes]) -> None:
    hasher = Hasher()
    for piece in pieces:
        hasher.update(memoryview(piece))
    whole = b"".join(pieces)
    assert (hasher.digest(), hasher.size_bytes) == (digest_of(whole), len(whole))


def test_a_file_has_the_digest_of_its_content(tmp_path: Path) -> None:
    content = b"x" * (3 << 20)
    (tmp_path / "blob").write_bytes(content)
    assert digest_of_file(tmp_path / "blob") == digest_of(content)


def test_other_bytes_than_promised_are_named() -> None:
    hasher = Hasher().update(b"abc")
    hasher.require(digest_of(b"abc"))
    with pytest.raises(IntegrityError, match="over 3 bytes; fetch it again"):
        hasher.require(digest_of(b"abd"))
