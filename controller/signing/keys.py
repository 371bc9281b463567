"""Private keys and where they are: files, environment variables, and whatever else learns to be a `SignerSource`.

A source is asked anew for every signature, so that keys can be carried off the machine, and back, while it runs. A key
management service fits behind the same protocol: its signers send what is to be signed and never give out a key. They
may block; the callers are on threads.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from controller.signing.model import KeyRole, PublicKey
from core.atomic_files import write_atomically
from core.errors import InvalidRequest, Untrusted

_log = logging.getLogger(__name__)

ENVIRONMENT_PREFIX = "NANOFLEET_SIGNING_KEY_"
# A PEM file of an Ed25519 key has 119 bytes.
_MAX_PEM_BYTES = 4096


class Signer(Protocol):
    @property
    def public_key(self) -> PublicKey: ...

    def sign(self, content: bytes) -> bytes:
        """Return the Ed25519 signature over `content` (RFC 8032)."""
        ...


class SignerSource(Protocol):
    @property
    def place(self) -> str:
        """Say in words where it looks, for operators."""
        ...

    def signers(self, role: KeyRole) -> Sequence[Signer]:
        """Return what can sign for `role` at this moment, in a stable order.

        Raises:
            InvalidRequest: what is named as a key is no Ed25519 key.
            Untrusted: others may read a key.
        """
        ...


class PrivateKey:
    """A `Signer` over a key in memory."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = PublicKey(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    @classmethod
    def generate(cls) -> "PrivateKey":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes, *, where: str) -> "PrivateKey":
        """Return the key.

        Raises:
            InvalidRequest: it is not one Ed25519 key in PEM (PKCS #8), unencrypted; `where` is named.
        """
        try:
            key = load_pem_private_key(pem, None)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{where}: expected an unencrypted private key in PEM, got {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise InvalidRequest(f"{where}: expected an Ed25519 key, got {type(key).__name__}")
        return cls(key)

    def to_pem(self) -> bytes:
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, content: bytes) -> bytes:
        return self._key.sign(content)


class KeyFiles:
    """Files `<folder>/<role>/<key id>.pem`, readable by their owner only; the names are for people."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.place = f"files in {folder}"
        self._skipped: set[Path] = set()

    def signers(self, role: KeyRole) -> Sequence[PrivateKey]:
        """Return the keys that are here; a file that is none is skipped, so that it does not stop the others.

        Raises:
            Untrusted: others may read a key.
        """
        found = (self._key(path) for path in sorted((self._folder / role).glob("*.pem")))
        return [key for key in found if key is not None]

    def _key(self, path: Path) -> PrivateKey | None:
        try:
            _require_private(path)
            key = read_key(path)
        except (InvalidRequest, OSError) as error:
            self._note_skipped(path, error)
            return None
        self._skipped.discard(path)
        return key

    def _note_skipped(self, path: Path, error: Exception) -> None:
        """Log it once: keys are looked for at every signature. If it was a needed one, that is missed by its id."""
        level = logging.DEBUG if path in self._skipped else logging.WARNING
        self._skipped.add(path)
        _log.log(level, "skipped what is no signing key", extra={"path": str(path), "reason": str(error)})

    def create(self, role: KeyRole) -> PublicKey:
        """Make a key, durable when this returns."""
        key = PrivateKey.generate()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._folder / role).mkdir(mode=0o700, exist_ok=True)
        write_key(self._folder / role / f"{key.public_key.id_for(role)[:16]}.pem", key)
        return key.public_key


class EnvironmentKeys:
    """Variables NANOFLEET_SIGNING_KEY_<ROLE> and NANOFLEET_SIGNING_KEY_<ROLE>_<n>, each with one PEM."""

    place = f"environment variables {ENVIRONMENT_PREFIX}…"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._pems = {name: pem for name, pem in environment.items() if name.startswith(ENVIRONMENT_PREFIX)}

    def signers(self, role: KeyRole) -> Sequence[PrivateKey]:
        pattern = re.compile(rf"{ENVIRONMENT_PREFIX}{role.upper()}(_[0-9]+)?")
        return [
            PrivateKey.from_pem(self._pems[name].encode(), where=f"environment variable {name}")
            for name in sorted(self._pems)
            if pattern.fullmatch(name)
        ]


class KeyRing:
    """Several sources as one; new keys are made as files."""

    def __init__(self, files: KeyFiles, *others: SignerSource) -> None:
        self._files = files
        self._sources: tuple[SignerSource, ...] = (files, *others)

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(source.place for source in self._sources)

    def signers(self, role: KeyRole) -> Mapping[str, Signer]:
        """Return what can sign for `role` now, by key id."""
        found = [signer for source in self._sources for signer in source.signers(role)]
        return {signer.public_key.id_for(role): signer for signer in found}

    def metadata_signers(self) -> Mapping[str, Signer]:
        """Return what can sign metadata now, by key id; the role's keys decide whose signature counts."""
        roles = (role for role in KeyRole if role is not KeyRole.DIRECTOR)
        return {key_id: signer for role in roles for key_id, signer in self.signers(role).items()}

    def create(self, role: KeyRole) -> PublicKey:
        return self._files.create(role)


def _require_private(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        raise Untrusted(f"{path}: others may read this private key; run `chmod 600 {path}`, and replace it if they did")


def read_key(path: Path) -> PrivateKey:
    """Return the key in a PEM file.

    Raises:
        InvalidRequest: it cannot be read, or is no such key.
    """
    try:
        with path.open("rb") as file:
            pem = file.read(_MAX_PEM_BYTES)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}; expected the PEM file of a private key") from error
    return PrivateKey.from_pem(pem, where=str(path))


def write_key(path: Path, key: PrivateKey) -> None:
    write_atomically(path, key.to_pem(), mode=0o600)
