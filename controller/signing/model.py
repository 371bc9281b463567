"""The values of the catalogue: roles, keys, files, and what operators are told of them."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import SSlibKey

from core.digest import Digest
from core.errors import InvalidRequest
from core.ids import ModelName, VariantName
from core.manifest import Manifest

_RAW_KEY_BYTES = 32


class KeyRole(StrEnum):
    """What a key may sign. TARGETS signs `targets` and every family; DIRECTOR signs assignments, not metadata."""

    ROOT = "root"
    TARGETS = "targets"
    SNAPSHOT = "snapshot"
    TIMESTAMP = "timestamp"
    DIRECTOR = "director"


# Any two of three can replace the third: one may be lost, and one may be stolen (TUF 6.1).
ROOT_KEYS = 3
ROOT_THRESHOLD = 2
KEY_COUNTS = {role: ROOT_KEYS if role is KeyRole.ROOT else 1 for role in KeyRole}


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 key as its 32 raw bytes."""

    raw: bytes

    @classmethod
    def from_hex(cls, text: str) -> "PublicKey":
        """Return the key.

        Raises:
            InvalidRequest: it is not 64 hexadecimal digits.
        """
        try:
            raw = bytes.fromhex(text)
        except ValueError:
            raw = b""
        if len(raw) != _RAW_KEY_BYTES:
            raise InvalidRequest(f"public key: expected 64 hexadecimal digits, got {text[:80]!r}")
        return cls(raw)

    @property
    def hex(self) -> str:
        return self.raw.hex()

    @property
    def key_id(self) -> str:
        """What TUF metadata calls it: a digest over its canonical form (TUF 4.2.1)."""
        return self.to_tuf().keyid

    @property
    def director_id(self) -> str:
        """What assignments call it: the SHA-256 of the raw key in hexadecimal."""
        return sha256(self.raw).hexdigest()

    def to_tuf(self) -> SSlibKey:
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(self.raw))

    def id_for(self, role: KeyRole) -> str:
        return self.director_id if role is KeyRole.DIRECTOR else self.key_id


@dataclass(frozen=True, slots=True)
class RoleFile:
    """One version of one role's metadata, signed."""

    role: str
    version: int
    content: bytes

    @property
    def name(self) -> str:
        """The file's name with consistent snapshots (TUF 6.2)."""
        return "timestamp.json" if self.role == KeyRole.TIMESTAMP else f"{self.version}.{self.role}.json"


@dataclass(frozen=True, slots=True)
class StagedFile:
    """The next version of a role, short of signatures."""

    role: str
    content: bytes
    created_at: datetime


class Releasable(Protocol):
    """What the catalogue needs to know of a variant."""

    @property
    def model(self) -> ModelName: ...
    @property
    def version(self) -> int: ...
    @property
    def variant(self) -> VariantName: ...
    @property
    def manifest_digest(self) -> Digest: ...
    @property
    def manifest(self) -> Manifest: ...


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long signatures hold; delivery.md bounds targets at 90 days and timestamp at 7."""

    root: timedelta = timedelta(days=365)
    targets: timedelta = timedelta(days=90)
    online: timedelta = timedelta(days=7)

    def of(self, role: str) -> timedelta:
        match role:
            case KeyRole.ROOT:
                return self.root
            case KeyRole.SNAPSHOT | KeyRole.TIMESTAMP:
                return self.online
            case _:
                return self.targets


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """A role as the catalogue has it now. `present` are those of its `key_ids` that this machine can sign with."""

    role: str
    version: int
    expires_at: datetime
    threshold: int
    key_ids: tuple[str, ...]
    present: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StagedStatus:
    """A role's next version, how many signatures it has of those it needs, and whose may be added."""

    role: str
    version: int
    created_at: datetime
    signatures: int
    threshold: int
    missing_key_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SigningStatus:
    roles: tuple[RoleStatus, ...]
    staged: tuple[StagedStatus, ...]
    # In words: where this machine looks for keys.
    key_places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rotation:
    """A key of `role` taken out and another put in. `is_published`: agents get it now; else it is staged."""

    role: KeyRole
    removed: str
    added: str
    is_published: bool
