"""Metadata on its way to keys that are elsewhere, and back: one JSON file that is carried there and returned signed.

    controller ── stage ──▶ bundle ──▶ another machine: sign ──▶ bundle, signed ── publish ──▶ controller

Signing needs no controller and no network. Whoever signs should read `changes` first: a controller that was taken over
can stage what it likes, and these signatures are what it lacks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from tuf.api.metadata import Root, Targets

from controller.signing.edition import ROOT, TARGETS, AnyMetadata, Edition, floor_of, parse_metadata
from controller.signing.keys import Signer
from controller.signing.model import RoleFile
from controller.signing.revision import Revision
from core.catalogue import DIRECTOR_KEYS, RELEASE_FLOOR
from core.errors import InvalidRequest, TooLarge

FORMAT = "nanofleet staged metadata 1"
# Derived: every family of a full catalogue anew, at a few dozen versions each.
MAX_BUNDLE_BYTES = 16 << 20
_MAX_ROLES = 256


@dataclass(frozen=True, slots=True)
class Bundle:
    """`current` is what is published of root, targets and the staged roles; `staged` is what shall be signed."""

    current: Mapping[str, bytes]
    staged: Mapping[str, bytes]

    @classmethod
    def of(cls, edition: Edition, staged: Mapping[str, bytes]) -> "Bundle":
        roles = [role for role in edition.files if role in (ROOT, TARGETS) or role in staged]
        return cls({role: edition.files[role].content for role in roles}, staged)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Bundle":
        """Return the bundle; nothing in it is verified.

        Raises:
            TooLarge: it has more than MAX_BUNDLE_BYTES.
            InvalidRequest: it is not what `to_bytes` writes.
        """
        if len(content) > MAX_BUNDLE_BYTES:
            raise TooLarge(f"bundle: expected at most {MAX_BUNDLE_BYTES} bytes, got {len(content)}")
        try:
            fields = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"bundle: expected JSON, got {error}") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise InvalidRequest(f"bundle: expected a file with format {FORMAT!r}, from `nanofleet signing stage`")
        return cls(_contents(fields, "current"), _contents(fields, "staged"))

    def to_bytes(self) -> bytes:
        fields = {
            "format": FORMAT,
            "current": {role: orjson.Fragment(content) for role, content in self.current.items()},
            "staged": {role: orjson.Fragment(content) for role, content in self.staged.items()},
        }
        return orjson.dumps(fields, option=orjson.OPT_INDENT_2)

    def metadata(self) -> Mapping[str, AnyMetadata]:
        """Return the staged metadata, parsed. Raises InvalidRequest."""
        return {role: _parsed(role, content) for role, content in self.staged.items()}

    def signed(self, signers: Mapping[str, Signer], *, now: datetime) -> "Bundle":
        """Return the bundle with every signature that these signers can add.

        Raises:
            InvalidRequest: none of them counts for anything that is staged.
        """
        revision = self._revision(now)
        wanted = {key_id for role in self.staged for key_id in revision.missing_key_ids(role)}
        if not wanted & signers.keys():
            raise InvalidRequest(
                f"sign: expected one of the keys {', '.join(sorted(key[:16] for key in wanted)) or 'none'}, got "
                f"{', '.join(sorted(key[:16] for key in signers)) or 'none'}"
            )
        revision.sign(signers)
        return Bundle(self.current, revision.drafts)

    def missing(self, *, now: datetime) -> Mapping[str, tuple[str, ...]]:
        """Return the keys that could still sign each role that is short of signatures."""
        revision = self._revision(now)
        missing = {role: revision.missing_key_ids(role) for role in self.staged}
        return {role: key_ids for role, key_ids in missing.items() if key_ids}

    def changes(self) -> list[str]:
        """Say in words what the staged metadata changes."""
        current = {role: _parsed(role, content) for role, content in self.current.items()}
        return [
            line for role, draft in sorted(self.metadata().items()) for line in _changes(role, current.get(role), draft)
        ]

    def _revision(self, now: datetime) -> Revision:
        if not {ROOT, TARGETS} <= self.current.keys():
            raise InvalidRequest("bundle: expected the current root and targets in it; run `nanofleet signing stage`")
        for role, content in (*self.current.items(), *self.staged.items()):
            _parsed(role, content)
        edition = Edition.of(RoleFile(role, 0, content) for role, content in self.current.items())
        return Revision(edition, self.staged, now=now)


def _parsed(role: str, content: bytes) -> AnyMetadata:
    """Return a role's metadata with all that we read of it in its place.

    Raises:
        InvalidRequest: it is not TUF metadata, or not of that role, or a field of ours is missing.
    """
    metadata = parse_metadata(content, where=f"bundle: {role}")
    signed = metadata.signed
    if role == ROOT:
        is_ours = isinstance(signed, Root)
    elif role == TARGETS:
        listed = isinstance(signed, Targets) and signed.unrecognized_fields.get(DIRECTOR_KEYS)
        is_ours = isinstance(listed, dict) and signed.delegations is not None and signed.delegations.roles is not None
    else:
        is_ours = isinstance(signed, Targets) and isinstance(signed.unrecognized_fields.get(RELEASE_FLOOR), int)
    if not is_ours:
        raise InvalidRequest(
            f"bundle: {role[:80]}: expected metadata of that role, as `nanofleet signing stage` writes"
        )
    return metadata


def _contents(fields: Mapping[str, Any], key: str) -> Mapping[str, bytes]:
    found = fields.get(key)
    if not isinstance(found, dict) or len(found) > _MAX_ROLES:
        raise InvalidRequest(f"bundle: expected {key!r} with at most {_MAX_ROLES} roles")
    return {str(role): orjson.dumps(content) for role, content in found.items()}


def _changes(role: str, before: AnyMetadata | None, after: AnyMetadata) -> Iterable[str]:
    expires_at: datetime = after.signed.expires
    yield f"{role}: version {after.signed.version}, expires {expires_at:%Y-%m-%d}"
    if role == ROOT:
        yield from _root_changes(None if before is None else before.signed, after.signed)
        return
    old = {} if before is None else before.signed.targets
    for path in sorted(after.signed.targets.keys() - old.keys()):
        yield f"  + {path}  sha256:{after.signed.targets[path].hashes['sha256']}"
    yield from (f"  - {path}" for path in sorted(old.keys() - after.signed.targets.keys()))
    yield from (
        f"  ! {path} has other bytes" for path in sorted(old) if after.signed.targets.get(path, old[path]) != old[path]
    )
    if role == TARGETS:
        yield from _targets_changes({} if before is None else before.signed, after.signed)
    elif before is None or floor_of(before.signed) != floor_of(after.signed):
        yield f"  floor {floor_of(after.signed)}"


def _root_changes(before: Any, after: Any) -> Iterable[str]:
    for role, keys in after.roles.items():
        old = set() if before is None else set(before.roles[role].keyids)
        yield from (f"  + {role} key {key_id}" for key_id in keys.keyids if key_id not in old)
        yield from (f"  - {role} key {key_id}" for key_id in sorted(old - set(keys.keyids)))
        if before is not None and before.roles[role].threshold != keys.threshold:
            yield f"  ! {role} needs {keys.threshold} signatures instead of {before.roles[role].threshold}"


def _targets_changes(before: Any, after: Any) -> Iterable[str]:
    old = before.unrecognized_fields[DIRECTOR_KEYS] if before else {}
    new = after.unrecognized_fields[DIRECTOR_KEYS]
    yield from (f"  + director key {key_id}" for key_id in sorted(new.keys() - old.keys()))
    yield from (f"  - director key {key_id}" for key_id in sorted(old.keys() - new.keys()))
    families = before.delegations.roles if before else {}
    yield from (f"  + {role}" for role in sorted(after.delegations.roles.keys() - families.keys()))
