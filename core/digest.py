"""SHA-256 content digests, written `sha256:` and 64 lower-case hexadecimal digits."""

import hashlib
import re
from pathlib import Path
from typing import NewType, Self

from core.errors import IntegrityError, InvalidRequest

Digest = NewType("Digest", str)

_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
# Chosen: large enough that hashing dominates, small enough to stay in the second-level cache.
_READ_BYTES = 1 << 20


def parse_digest(text: str) -> Digest:
    """Return `text` as a digest.

    Raises:
        InvalidRequest: it is not `sha256:` and 64 lower-case hexadecimal digits.
    """
    if _PATTERN.fullmatch(text) is None:
        raise InvalidRequest(f"expected sha256: and 64 lower-case hexadecimal digits, got {text[:80]!r}")
    return Digest(text)


def hex_of(digest: Digest) -> str:
    return digest.removeprefix("sha256:")


def digest_of(content: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(content).hexdigest()}")


def digest_of_file(path: Path) -> Digest:
    hasher = Hasher()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            hasher.update(block)
    return hasher.digest()


class Hasher:
    """A digest of bytes that arrive in pieces."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def update(self, block: bytes | memoryview) -> Self:
        self._sha256.update(block)
        self.size_bytes += len(block)
        return self

    def digest(self) -> Digest:
        return Digest(f"sha256:{self._sha256.hexdigest()}")

    def require(self, expected: Digest) -> None:
        """Raise IntegrityError unless the bytes so far have the digest `expected`."""
        found = self.digest()
        if found != expected:
            raise IntegrityError(f"expected {expected}, got {found} over {self.size_bytes} bytes; fetch it again")
