"""The next versions of root, targets and families: drafted, signed, verified. Pure, like python-tuf's
`trusted_metadata_set`: no clock, no files, no database.

    edition + staged ──▶ Revision ──▶ release · revoke · renew · replace_key …   each edits drafts
                            │
                            ├─ sign      with whatever keys there are
                            ├─ adopt     signatures that were made elsewhere
                            └─ settled   ──▶ (files that hold now, drafts that wait for signatures)

A draft is always one version above the published one, however often it is edited before it is signed, and editing it
drops the signatures that it had.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets, VerificationResult

from controller.signing.edition import (
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    AnyMetadata,
    Edition,
    add_signature,
    file_of,
    floor_of,
    parse_metadata,
    revoked_of,
)
from controller.signing.keys import Signer
from controller.signing.model import ROOT_THRESHOLD, KeyRole, Lifetimes, PublicKey, Releasable, RoleFile
from core.catalogue import (
    DIRECTOR_KEYS,
    ISSUED,
    MAX_FAMILIES,
    RELEASE_FLOOR,
    REVOKED,
    family_paths,
    family_role,
    target_path,
)
from core.digest import hex_of
from core.errors import Conflict, InvalidRequest, NotFound, Untrusted
from core.ids import ModelName


class Settled(NamedTuple):
    """What can be published now, and what cannot yet."""

    files: tuple[RoleFile, ...]
    waiting: Mapping[str, bytes]


class Revision:
    def __init__(
        self, edition: Edition, staged: Mapping[str, bytes], *, now: datetime, lifetimes: Lifetimes | None = None
    ) -> None:
        self._edition = edition
        self._now = now
        self._lifetimes = lifetimes or Lifetimes()
        self._drafts = {role: parse_metadata(content, where=f"staged {role}") for role, content in staged.items()}

    @property
    def drafts(self) -> Mapping[str, bytes]:
        return {role: draft.to_bytes() for role, draft in self._drafts.items()}

    # ---- edits -----------------------------------------------------------------------------------------------

    def begin(self, keys: Mapping[KeyRole, Sequence[PublicKey]]) -> None:
        """Draft the first root and targets."""
        self._drafts[ROOT] = Metadata(Root(consistent_snapshot=True))
        root = self._edit(ROOT)
        for role in (role for role in KeyRole if role is not KeyRole.DIRECTOR):
            for key in keys[role]:
                root.add_key(key.to_tuf(), role)
        root.roles[ROOT].threshold = ROOT_THRESHOLD
        self._drafts[TARGETS] = Metadata(Targets(delegations=Delegations({}, {})))
        director_keys = {key.director_id: key.hex for key in keys[KeyRole.DIRECTOR]}
        self._edit(TARGETS).unrecognized_fields[DIRECTOR_KEYS] = director_keys

    def release(self, variants: Iterable[Releasable]) -> None:
        """List variants, but those that are listed, taken back or below the floor already, or have no counter.

        Raises:
            Conflict: there are MAX_FAMILIES models, or a listed variant would change its bytes.
        """
        for variant in variants:
            if self._is_new(variant):
                content = variant.manifest.to_bytes()
                path = target_path(variant.model, variant.version, variant.variant)
                family = self._edit_family(variant.model)
                family.targets[path] = TargetFile.from_data(path, content, ["sha256"])

    def revoke(self, model: ModelName, *, versions: Collection[int]) -> None:
        """Take versions back, and raise the floor as far as the versions that stay allow.

        Raises:
            NotFound: nothing of the model is listed.
            InvalidRequest: a version is not listed.
        """
        role = family_role(model)
        if role not in self._drafts and role not in self._edition.files:
            raise NotFound(f"model {model!r}: not in the catalogue, so there is nothing to revoke")
        listed = {_version_of(path) for path in self._read(role).targets}
        if unknown := sorted(set(versions) - listed):
            raise InvalidRequest(f"model {model}: expected versions of {sorted(listed)}, got {unknown}")
        if versions:
            self._drop(self._edit(role), listed, set(versions))

    def revoke_below(self, model: ModelName, floor: int) -> None:
        """Take back every version below `floor`, and let none come again."""
        role = family_role(model)
        if role not in self._drafts and role not in self._edition.files:
            raise NotFound(f"model {model!r}: not in the catalogue, so there is nothing to revoke")
        if floor > floor_of(self._read(role)):
            family = self._edit(role)
            listed = {_version_of(path) for path in family.targets}
            self._drop(family, listed, {version for version in listed if version < floor}, at_least=floor)

    def roles(self) -> list[str]:
        """Return every role whose next version could be drafted."""
        return sorted({*self._edition.files, *self._drafts} - {SNAPSHOT, TIMESTAMP})

    def renew(self, role: str) -> None:
        """Draft the same content with a later expiry."""
        self._edit(role)

    def replace_key(self, role: KeyRole, old: str, new: PublicKey) -> None:
        """Give `role` the key `new` for its key with id `old`; everything that key must sign is drafted anew."""
        if role is KeyRole.DIRECTOR:
            listed = self._edit(TARGETS).unrecognized_fields[DIRECTOR_KEYS]
            del listed[old]
            listed[new.director_id] = new.hex
            return
        root = self._edit(ROOT)
        root.revoke_key(old, role)
        root.add_key(new.to_tuf(), role)
        if role is KeyRole.TARGETS:
            self._replace_family_key(old, new)

    def key_ids(self, role: KeyRole) -> tuple[str, ...]:
        """Return the keys that a role has after this revision."""
        if role is KeyRole.DIRECTOR:
            return tuple(self._read(TARGETS).unrecognized_fields[DIRECTOR_KEYS])
        return tuple(self._read(ROOT).roles[role].keyids)

    def expires_at(self, role: str) -> datetime:
        expires_at: datetime = self._read(role).expires
        return expires_at

    # ---- signatures ------------------------------------------------------------------------------------------

    def sign(self, signers: Mapping[str, Signer]) -> None:
        """Add every signature that counts, is missing and can be made."""
        for role, draft in self._drafts.items():
            for key_id in self.missing_key_ids(role):
                if (signer := signers.get(key_id)) is not None:
                    add_signature(draft, key_id, signer)

    def adopt(self, signed: Mapping[str, AnyMetadata]) -> None:
        """Take over the valid ones among signatures that were made elsewhere over exactly these drafts.

        Raises:
            Conflict: what was signed is not what is staged.
        """
        if signed.keys() != self._drafts.keys():
            raise Conflict(
                f"signed metadata: expected {sorted(self._drafts)}, got {sorted(signed)[:8]}; "
                "run `nanofleet signing stage` again and sign that"
            )
        for role, metadata in signed.items():
            if metadata.signed_bytes != self._drafts[role].signed_bytes:
                raise Conflict(
                    f"signed metadata: {role} is not what is staged now; run `nanofleet signing stage` again and sign "
                    "that"
                )
            draft = self._drafts[role]
            draft.signatures = {**metadata.signatures, **draft.signatures}
            valid = {key_id for result in self.verification(role) for key_id in result.signed}
            draft.signatures = {key_id: signature for key_id, signature in draft.signatures.items() if key_id in valid}

    def verification(self, role: str) -> list[VerificationResult]:
        """Return what each delegator of a draft says of its signatures; a root has two (TUF 5.3.4)."""
        draft = self._drafts[role]
        delegators: list[Root | Targets]
        if role == ROOT:
            delegators = [draft.signed] if self._edition.is_empty else [self._edition.root, draft.signed]
        else:
            delegators = [self._read(ROOT if role == TARGETS else TARGETS)]
        return [each.get_verification_result(role, draft.signed_bytes, draft.signatures) for each in delegators]

    def missing_key_ids(self, role: str) -> tuple[str, ...]:
        """Return the keys that could still sign a draft; none when it has what it needs."""
        short = [result for result in self.verification(role) if not result.verified]
        return tuple(dict.fromkeys(key_id for result in short for key_id in result.unsigned))

    def settled(self) -> Settled:
        """Return what holds by itself now: all, or all but a root on which nothing else depends, or nothing.

        Raises:
            Untrusted: a draft expired while it waited.
        """
        if all(self._holds(role) for role in self._drafts):
            return self._accepted(self._drafts)
        without_root = {role: draft.to_bytes() for role, draft in self._drafts.items() if role != ROOT}
        if ROOT in self._drafts and without_root and not self._edition.is_empty:
            rest = Revision(self._edition, without_root, now=self._now, lifetimes=self._lifetimes)
            if all(rest._holds(role) for role in without_root):
                return self._accepted(without_root)
        return Settled((), self.drafts)

    def _holds(self, role: str) -> bool:
        return all(result.verified for result in self.verification(role))

    def _accepted(self, roles: Iterable[str]) -> Settled:
        accepted = [file_of(role, self._drafts[role]) for role in roles]
        for file in accepted:
            if self.expires_at(file.role) <= self._now:
                raise Untrusted(
                    f"staged {file.role}: expired at {self.expires_at(file.role)}; run `nanofleet signing stage` again"
                )
        done = {file.role for file in accepted}
        return Settled(tuple(accepted), {role: content for role, content in self.drafts.items() if role not in done})

    # ---- drafts ----------------------------------------------------------------------------------------------

    def _read(self, role: str) -> Any:
        """Return the signed part as this revision has it, not to be changed."""
        return (self._drafts.get(role) or self._edition.parsed[role]).signed

    def _edit(self, role: str) -> Any:
        """Return the signed part of a role's draft, to be changed; it is made of the published version if need be."""
        if role not in self._drafts:
            self._drafts[role] = parse_metadata(self._edition.file(role).content, where=role)
            self._drafts[role].signed.version += 1
        draft = self._drafts[role]
        draft.signatures.clear()
        draft.signed.expires = self._now + self._lifetimes.of(role)
        draft.signed.unrecognized_fields[ISSUED] = f"{self._now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        return draft.signed

    def _edit_family(self, model: ModelName) -> Targets:
        role = family_role(model)
        if role not in self._drafts and role not in self._edition.files:
            self._delegate(model)
            fields = {RELEASE_FLOOR: 1, REVOKED: []}
            self._drafts[role] = Metadata(Targets(unrecognized_fields=fields))
        family: Targets = self._edit(role)
        return family

    def _delegate(self, model: ModelName) -> None:
        """Let `targets` delegate the model's paths, and nothing else, to a role with the same keys."""
        delegations = _delegations(self._edit(TARGETS))
        assert delegations.roles is not None
        if len(delegations.roles) >= MAX_FAMILIES:
            raise Conflict(f"catalogue: expected at most {MAX_FAMILIES} models, got {model!r} as one more")
        role = DelegatedRole(family_role(model), [], 1, terminating=True, paths=[family_paths(model)])
        delegations.roles[role.name] = role
        root: Root = self._read(ROOT)
        for key_id in root.roles[TARGETS].keyids:
            self._read(TARGETS).add_key(root.keys[key_id], role.name)

    def _replace_family_key(self, old: str, new: PublicKey) -> None:
        targets: Targets = self._edit(TARGETS)
        for role in _delegations(targets).roles or {}:
            targets.revoke_key(old, role)
            targets.add_key(new.to_tuf(), role)
            self._edit(role)

    def _is_new(self, variant: Releasable) -> bool:
        role = family_role(variant.model)
        if variant.manifest.release_counter is None:
            return False
        if role not in self._drafts and role not in self._edition.files:
            return True
        family: Targets = self._read(role)
        if variant.version < floor_of(family) or variant.version in revoked_of(family):
            return False
        path = target_path(variant.model, variant.version, variant.variant)
        if (known := family.targets.get(path)) is None:
            return True
        if known.hashes["sha256"] != hex_of(variant.manifest_digest):
            raise Conflict(f"catalogue: {path} is listed with other bytes; publish a new version instead")
        return False

    def _drop(self, family: Targets, listed: set[int], taken: set[int], *, at_least: int = 1) -> None:
        kept = listed - taken
        floor = min(kept) if kept else max(listed, default=0) + 1
        floor = max(floor, at_least, floor_of(family))
        for path in [path for path in family.targets if _version_of(path) in taken]:
            del family.targets[path]
        family.unrecognized_fields[RELEASE_FLOOR] = floor
        revoked = {*revoked_of(family), *taken}
        family.unrecognized_fields[REVOKED] = sorted(version for version in revoked if version >= floor)


def _delegations(targets: Targets) -> Delegations:
    assert targets.delegations is not None
    return targets.delegations


def _version_of(path: str) -> int:
    return int(path.split("/")[1])
