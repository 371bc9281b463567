"""The catalogue as it is published: one file per role, parsed, and the questions that are asked of it. Pure.

An `Edition` is a value: a later one is made of it and the files that changed, and shares the rest. Signing the next
`snapshot` and `timestamp` is here too, because they say nothing of their own: they follow from the other files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from securesystemslib.signer import Signature
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from controller.signing.keys import Signer
from controller.signing.model import KeyRole, Lifetimes, RoleFile
from core.catalogue import DIRECTOR_KEYS, RELEASE_FLOOR, REVOKED
from core.digest import Digest
from core.errors import InvalidRequest, NotFound, Unavailable

AnyMetadata: TypeAlias = Metadata[Any]

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = (
    str(role) for role in (KeyRole.ROOT, KeyRole.TARGETS, KeyRole.SNAPSHOT, KeyRole.TIMESTAMP)
)


def parse_metadata(content: bytes, *, where: str) -> AnyMetadata:
    """Return metadata as an object of the caller's own, to be changed at will.

    Raises:
        InvalidRequest: it is not TUF metadata.
    """
    try:
        return Metadata.from_bytes(content)
    except DeserializationError as error:
        raise InvalidRequest(f"{where}: expected TUF metadata in JSON, got {error}") from error


def file_of(role: str, metadata: AnyMetadata) -> RoleFile:
    return RoleFile(role, metadata.signed.version, metadata.to_bytes())


@dataclass(frozen=True, slots=True)
class Edition:
    """The newest published file of every role. `parsed` is shared and never changed."""

    files: Mapping[str, RoleFile]
    parsed: Mapping[str, AnyMetadata]
    # The manifests that may be installed; where each of them is a target.
    released: Mapping[Digest, str]

    @classmethod
    def of(cls, files: Iterable[RoleFile], *, after: "Edition | None" = None) -> "Edition":
        """Return the edition of `files`, with those of the edition before where there is no new one.

        Raises:
            InvalidRequest: a file is not TUF metadata.
        """
        newer = {file.role: file for file in files}
        parsed = {role: parse_metadata(file.content, where=file.name) for role, file in newer.items()}
        if after is not None:
            newer, parsed = {**after.files, **newer}, {**after.parsed, **parsed}
        return cls(newer, parsed, _released(parsed))

    @property
    def is_empty(self) -> bool:
        return not self.files

    @property
    def root(self) -> Root:
        root = self.parsed[ROOT].signed
        assert isinstance(root, Root)
        return root

    @property
    def targets(self) -> Targets:
        targets = self.parsed[TARGETS].signed
        assert isinstance(targets, Targets)
        return targets

    @property
    def director_ids(self) -> Mapping[str, str]:
        """The raw public keys, in hexadecimal, by which assignments may be signed, by their ids."""
        listed: Mapping[str, str] = self.targets.unrecognized_fields[DIRECTOR_KEYS]
        return listed

    def withdraws_from(self, before: "Edition") -> bool:
        """Say whether something that `before` lists, a variant or a director key, is listed no more."""
        if before.is_empty:
            return False
        has_all = (
            self.released.keys() >= before.released.keys() and self.director_ids.keys() >= before.director_ids.keys()
        )
        return not has_all

    def file(self, role: str) -> RoleFile:
        try:
            return self.files[role]
        except KeyError:
            raise NotFound(f"catalogue: no role {role[:80]!r}") from None

    def expires_at(self, role: str) -> datetime:
        expires_at: datetime = self.parsed[role].signed.expires
        return expires_at

    def key_ids(self, role: str) -> tuple[tuple[str, ...], int]:
        """Return the keys of a role and how many of them must sign."""
        delegator = self.root if role in self.root.roles else self.targets
        found = delegator.get_delegated_role(role)
        return tuple(found.keyids), found.threshold


NO_EDITION = Edition({}, {}, {})


def floor_of(family: Targets) -> int:
    floor: int = family.unrecognized_fields[RELEASE_FLOOR]
    return floor


def revoked_of(family: Targets) -> tuple[int, ...]:
    """Return the versions above the floor that were taken back."""
    return tuple(family.unrecognized_fields[REVOKED])


def sealed(edition: Edition, *, now: datetime, lifetimes: Lifetimes, signers: Mapping[str, Signer]) -> list[RoleFile]:
    """Return the next snapshot and timestamp over an edition's root, targets and families.

    Raises:
        Unavailable: this machine has not the keys.
    """
    meta = {
        f"{role}.json": _meta_file(file)
        for role, file in sorted(edition.files.items())
        if role not in (ROOT, SNAPSHOT, TIMESTAMP)
    }
    expires_at = now + lifetimes.online
    snapshot = Snapshot(_next_version(edition, SNAPSHOT), expires=expires_at, meta=meta)
    snapshot_file = _signed_online(edition, SNAPSHOT, Metadata(snapshot), signers)
    over = _meta_file(snapshot_file)
    timestamp = Timestamp(_next_version(edition, TIMESTAMP), expires=expires_at, snapshot_meta=over)
    return [snapshot_file, _signed_online(edition, TIMESTAMP, Metadata(timestamp), signers)]


def add_signature(metadata: AnyMetadata, key_id: str, signer: Signer) -> None:
    metadata.signatures[key_id] = Signature(key_id, signer.sign(metadata.signed_bytes).hex())


def _signed_online(edition: Edition, role: str, metadata: AnyMetadata, signers: Mapping[str, Signer]) -> RoleFile:
    key_ids, threshold = edition.key_ids(role)
    for key_id in key_ids:
        if (signer := signers.get(key_id)) is not None:
            add_signature(metadata, key_id, signer)
    if len(metadata.signatures) < threshold:
        raise Unavailable(
            f"signing: expected {threshold} of the {role} keys {', '.join(key[:16] for key in key_ids)} on this "
            "machine, which must sign at every publish; bring them back, or `nanofleet signing rotate` them"
        )
    return file_of(role, metadata)


def _next_version(edition: Edition, role: str) -> int:
    return edition.files[role].version + 1 if role in edition.files else 1


def _meta_file(file: RoleFile) -> MetaFile:
    # Length and hash too: a client never reads more than was signed (TUF 5.5.2).
    return MetaFile.from_data(file.version, file.content, ["sha256"])


def _released(parsed: Mapping[str, AnyMetadata]) -> Mapping[Digest, str]:
    return {
        Digest(f"sha256:{target.hashes['sha256']}"): path
        for role, metadata in parsed.items()
        if role not in (ROOT, SNAPSHOT, TIMESTAMP)
        for path, target in metadata.signed.targets.items()
    }
