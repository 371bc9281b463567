"""The agent's identity on disk: one numbered folder per state of it, and a pointer to the one that counts.

    identity/current           the number of the folder that counts
    identity/7/                key.pem  certificate.pem  trust.pem  identity.json
    identity/6/                what counted before, kept until 7 was seen to work (`confirm`)
    identity/pending.pem       a key that was sent for certification, and whose certificate is not here yet

A folder is written whole and made durable before the pointer names it, and is never changed afterwards; so a power
loss leaves the old or the new key, certificate and trust, never a mix. The pending key is written before it is sent, so
that it can be sent again when the reply is lost.
"""

import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, StringConstraints, ValidationError

from core.addresses import Address, parse_address
from core.atomic_files import sync_folder, write_atomically
from core.errors import IntegrityError, InvalidRequest, Unauthenticated
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, Name, SiteId

# Chosen: identities that were replaced before they were seen to work; more than one is rare.
MAX_EARLIER = 3
_SECRET_MODE, _FOLDER_MODE = 0o600, 0o700


class NotEnrolled(Unauthenticated):
    """There is no identity here yet."""


@dataclass(frozen=True, slots=True)
class Identity:
    """`controller` is the address for everything but renewal, `enrolment` the one for that.

    `root_sha256` (hexadecimal) is the root of the catalogue that the token named; `not_before` and `not_after` are the
    certificate's.
    """

    agent_id: AgentId
    site: SiteId
    trust_domain: str
    controller: Address
    enrolment: Address
    root_sha256: str
    not_before: datetime
    not_after: datetime
    # Not shown: it holds the private key.
    tls: TlsIdentity = field(repr=False)


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    """Where an identity stands, in PEM; they are there until the identity after the next was seen to work."""

    certificate: Path
    key: Path
    trust: Path


class _Document(BaseModel):
    # Not `forbid`: an older agent must be able to start on a newer one's folder.
    model_config = ConfigDict(frozen=True, extra="ignore")

    agent_id: Name
    site: Name
    trust_domain: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    controller: str
    enrolment: str
    root_sha256: Annotated[str, StringConstraints(pattern=r"\A[0-9a-f]{64}\z")]
    not_before: AwareDatetime
    not_after: AwareDatetime


class IdentityFolder:
    """Owns the folder `path`; one process at a time writes (the lock of the agent's state folder says who)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pointer = path / "current"
        self._pending = path / "pending.pem"

    def load(self) -> Identity:
        """Return the identity that counts.

        Raises:
            NotEnrolled: there is none.
            IntegrityError: it is there and damaged.
        """
        return self._read(self._current())

    def files(self) -> IdentityFiles:
        """Return the files of the identity that counts, for libraries that read no memory.

        Raises:
            NotEnrolled: there is none.
            IntegrityError: the pointer to it is damaged.
        """
        folder = self._path / str(self._current())
        return IdentityFiles(folder / "certificate.pem", folder / "key.pem", folder / "trust.pem")

    def earlier(self) -> tuple[Identity, ...]:
        """Return what counted before and is kept until what counts now was seen to work, newest first."""
        current = self._current()
        found = []
        for number in sorted((number for number in self._numbers() if number < current), reverse=True):
            try:
                found.append(self._read(number))
            except IntegrityError:
                # Half removed when the power failed; what counts is whole.
                continue
        return tuple(found)

    def replace(self, identity: Identity) -> None:
        """Make `identity` the one that counts, durably; what counted until now is kept for `earlier`."""
        self._make()
        number = max(self._numbers(), default=0) + 1
        self._write(number, identity)
        write_atomically(self._pointer, f"{number}\n".encode(), mode=_SECRET_MODE)
        self._tidy(keep=1 + MAX_EARLIER)
        if self.pending_key() == identity.tls.private_key:
            self.forget_pending()

    def give_up(self) -> None:
        """Forget every identity, durably; a pending key stays, since its certificate may be on its way."""
        if not self._path.is_dir():
            return
        self._pointer.unlink(missing_ok=True)
        sync_folder(self._path)
        for number in self._numbers():
            shutil.rmtree(self._path / str(number))

    def confirm(self) -> None:
        """Remember that what counts works: what counted before is removed."""
        self._tidy(keep=1)

    def pending_key(self) -> bytes | None:
        """Return the key that was sent for certification and whose certificate did not come; None: there is none."""
        try:
            return self._pending.read_bytes()
        except FileNotFoundError:
            return None

    def keep_pending(self, key: bytes) -> None:
        """Store `key` durably; to be called before it is sent."""
        if key != self.pending_key():
            self._make()
            write_atomically(self._pending, key, mode=_SECRET_MODE)

    def forget_pending(self) -> None:
        """Make a new key the next time; for a pending one that the controller will not certify."""
        self._pending.unlink(missing_ok=True)
        sync_folder(self._path)

    def _make(self) -> None:
        if self._path.is_dir():
            return
        self._path.mkdir(mode=_FOLDER_MODE, parents=True)
        sync_folder(self._path.parent)

    def _write(self, number: int, identity: Identity) -> None:
        folder, tls = self._path / str(number), identity.tls
        folder.mkdir(mode=_FOLDER_MODE)
        sync_folder(self._path)
        write_atomically(folder / "key.pem", tls.private_key, mode=_SECRET_MODE)
        write_atomically(folder / "certificate.pem", tls.certificate_chain, mode=_SECRET_MODE)
        write_atomically(folder / "trust.pem", tls.trust_bundle, mode=_SECRET_MODE)
        write_atomically(folder / "identity.json", _document_of(identity), mode=_SECRET_MODE)

    def _current(self) -> int:
        try:
            text = self._pointer.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            raise NotEnrolled("not enrolled: run `nanofleet-agent enrol TOKEN`") from None
        except ValueError:
            text = ""
        if not text.isdecimal():
            raise IntegrityError(f"{self._pointer}: expected a number, got something else; enrol again with --force")
        return int(text)

    def _numbers(self) -> list[int]:
        entries = self._path.iterdir() if self._path.is_dir() else ()
        return [int(entry.name) for entry in entries if entry.name.isdecimal()]

    def _read(self, number: int) -> Identity:
        folder = self._path / str(number)
        try:
            document = _Document.model_validate_json((folder / "identity.json").read_bytes())
            return _identity_of(
                document,
                TlsIdentity(
                    (folder / "certificate.pem").read_bytes(),
                    (folder / "key.pem").read_bytes(),
                    (folder / "trust.pem").read_bytes(),
                ),
            )
        except (OSError, ValidationError, InvalidRequest) as error:
            reason = f"expected a whole identity, got {type(error).__name__}"
            raise IntegrityError(f"{folder}: {reason}; enrol again with --force") from error

    def _tidy(self, *, keep: int) -> None:
        """Remove all but what counts and the `keep` - 1 before it, and what a power loss left half written."""
        current = self._current()
        known = sorted((number for number in self._numbers() if number <= current), reverse=True)
        kept = {str(number) for number in known[:keep]}
        for entry in list(self._path.iterdir()):
            if entry.name.isdecimal() and entry.name not in kept:
                shutil.rmtree(entry)
            elif entry.name.startswith("."):
                entry.unlink()


def _document_of(identity: Identity) -> bytes:
    document = _Document(
        agent_id=identity.agent_id,
        site=identity.site,
        trust_domain=identity.trust_domain,
        controller=str(identity.controller),
        enrolment=str(identity.enrolment),
        root_sha256=identity.root_sha256,
        not_before=identity.not_before,
        not_after=identity.not_after,
    )
    return document.model_dump_json(indent=1).encode()


def _identity_of(document: _Document, tls: TlsIdentity) -> Identity:
    return Identity(
        AgentId(document.agent_id),
        SiteId(document.site),
        document.trust_domain,
        parse_address(document.controller),
        parse_address(document.enrolment),
        document.root_sha256,
        document.not_before,
        document.not_after,
        tls,
    )
