"""What operators are told: every role's version, expiry and keys, and what waits for whose signatures."""

from collections.abc import Collection, Sequence
from datetime import datetime

from controller.signing.edition import TARGETS, Edition, parse_metadata
from controller.signing.keys import KeyRing
from controller.signing.model import KeyRole, RoleStatus, SigningStatus, StagedFile, StagedStatus
from controller.signing.revision import Revision


def status_of(edition: Edition, staged: Sequence[StagedFile], keys: KeyRing, *, now: datetime) -> SigningStatus:
    present = keys.metadata_signers().keys()
    roles = [_role(edition, role, present) for role in sorted(edition.files, key=_rank)]
    revision = Revision(edition, {file.role: file.content for file in staged}, now=now)
    waiting = tuple(_staged(revision, file) for file in sorted(staged, key=lambda file: _rank(file.role)))
    return SigningStatus((*roles, _director(edition, keys)), waiting, keys.places)


def _rank(role: str) -> tuple[int, str]:
    """Order roles as trust flows, families last."""
    order = [str(each) for each in KeyRole]
    return order.index(role) if role in order else len(order), role


def _role(edition: Edition, role: str, present: Collection[str]) -> RoleStatus:
    key_ids, threshold = edition.key_ids(role)
    here = tuple(key_id for key_id in key_ids if key_id in present)
    return RoleStatus(role, edition.file(role).version, edition.expires_at(role), threshold, key_ids, here)


def _director(edition: Edition, keys: KeyRing) -> RoleStatus:
    """Show the director beside the roles of TUF: its keys are as old as the `targets` that list them."""
    listed, present = tuple(edition.director_ids), keys.signers(KeyRole.DIRECTOR)
    here = tuple(key_id for key_id in listed if key_id in present)
    version, expires_at = edition.file(TARGETS).version, edition.expires_at(TARGETS)
    return RoleStatus(KeyRole.DIRECTOR, version, expires_at, 1, listed, here)


def _staged(revision: Revision, file: StagedFile) -> StagedStatus:
    # Of a root's two delegators the old one comes first; its threshold is the same.
    first = revision.verification(file.role)[0]
    return StagedStatus(
        role=file.role,
        version=parse_metadata(file.content, where=f"staged {file.role}").signed.version,
        created_at=file.created_at,
        signatures=len(first.signed),
        threshold=first.threshold,
        missing_key_ids=revision.missing_key_ids(file.role),
    )
