"""The decisions of verification: no clock, disk or network. What comes in, TUF has verified by signature and version.

TUF's own client judges expiry by the machine's clock, which may lie far behind; `require_current` judges it again by
the time that is passed in, which is never before the floor.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp

from core.catalogue import DIRECTOR_KEYS, ISSUED, RELEASE_FLOOR, family_role, target_path
from core.digest import hex_of
from core.errors import InvalidRequest, Unavailable, Untrusted
from core.fleet_state import ASSIGNMENT_CONTEXT, CatalogueVersions, DesiredState, SignedAssignment, Slot
from core.fleet_wire import decode_desired
from core.ids import AgentId, ModelName
from core.manifest import MAX_MANIFEST_BYTES
from edge_agent.trust.question import Statement
from protos.fleet.v1 import fleet_pb2 as pb

# Chosen: two are in use while one replaces the other; some room for a repair in a hurry.
MAX_DIRECTOR_KEYS = 16


@dataclass(frozen=True, slots=True)
class TopLevel:
    """The four top-level roles of one consistent state of the catalogue."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets


def decoded_assignment(signed: SignedAssignment, *, agent_id: AgentId) -> DesiredState:
    """Return what `signed` claims, for `agent_id`; nothing of it is proven yet.

    Raises:
        InvalidRequest: it is no desired state, or one that never expires.
        Untrusted: it is another agent's.
    """
    try:
        desired = decode_desired(pb.DesiredState.FromString(signed.payload))
    except DecodeError as error:
        raise InvalidRequest(f"assignment: expected a desired state, got {error}") from error
    if desired.agent_id != agent_id:
        raise Untrusted(f"assignment: expected one for agent {agent_id}, got one for {desired.agent_id}")
    if desired.expires_at is None:
        raise InvalidRequest("assignment: expected an instant at which it expires, got none")
    return desired


def require_signed(signed: SignedAssignment, targets: Targets) -> None:
    """Raise Untrusted unless a director key that `targets` lists signed the assignment."""
    keys = director_keys(targets)
    raw = keys.get(signed.key_id)
    if raw is None:
        raise Untrusted(
            f"assignment: expected a signature by one of the director keys {sorted(key[:12] for key in keys)} of the "
            f"catalogue, got one by {signed.key_id[:12]!r}; list the new key in the catalogue first"
        )
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(signed.signature, ASSIGNMENT_CONTEXT + signed.payload)
    except InvalidSignature:
        raise Untrusted(f"assignment: the signature by director key {signed.key_id[:12]} does not hold") from None


def require_unexpired(desired: DesiredState, *, now: datetime) -> None:
    assert desired.expires_at is not None
    if now >= desired.expires_at:
        raise Untrusted(f"assignment: it expired at {desired.expires_at:%Y-%m-%d %H:%M} UTC; deploy again")


def require_not_older(found: CatalogueVersions, accepted: CatalogueVersions) -> None:
    """Raise Untrusted when `found` is older than what was accepted once.

    A newer root may begin timestamps anew: so a fleet recovers whose online key was misused to run far ahead.
    """
    if found < accepted:
        raise Untrusted(
            f"catalogue: expected root {accepted.root} and timestamp {accepted.timestamp} or newer, as were accepted "
            f"before, got root {found.root} and timestamp {found.timestamp}"
        )


def require_current(roles: Mapping[str, Signed], *, now: datetime) -> None:
    """Raise Unavailable when one of `roles` has expired: newer metadata is needed, and may come."""
    for name, signed in roles.items():
        if signed.is_expired(now):
            raise Unavailable(
                f"catalogue: {name} expired at {signed.expires:%Y-%m-%d %H:%M} UTC; nothing new is installed before it "
                "is signed again (nanofleet signing status)"
            )


def director_keys(targets: Targets) -> Mapping[str, bytes]:
    """Return the raw Ed25519 keys by which assignments may be signed, by key id.

    Raises:
        Untrusted: the list is missing or is no list of keys.
    """
    listed = targets.unrecognized_fields.get(DIRECTOR_KEYS)
    if not isinstance(listed, dict) or not 1 <= len(listed) <= MAX_DIRECTOR_KEYS:
        raise Untrusted(f"catalogue: expected 1 to {MAX_DIRECTOR_KEYS} director keys in targets ({DIRECTOR_KEYS})")
    return {str(key_id): _director_key(str(key_id), text) for key_id, text in listed.items()}


def statement_on(slot: Slot, top: TopLevel, family: Metadata[Targets] | None) -> Statement:
    """Return what the catalogue says about the manifest of `slot`; `family` is the role of its model as it was found.

    Raises:
        Untrusted: it is not a current target of that role, or has other content than the assignment says.
    """
    path = target_path(slot.model, slot.version, slot.variant)
    if family is None:
        raise Untrusted(f"{path}: expected the catalogue to delegate {family_role(slot.model)}, it does not")
    _require_delegated(slot.model, path, top, family)
    target = family.signed.targets.get(path)
    if target is None:
        raise Untrusted(f"{path}: expected a current target of the catalogue; it was never signed, or was withdrawn")
    _require_same_content(slot, target)
    return Statement(target.length, _release_floor(slot.model, family.signed))


def issued_by(roles: Mapping[str, Signed], *, timestamp: Timestamp) -> datetime | None:
    """Return the latest instant at which one of the offline-signed `roles` was signed, by their own word.

    One that claims to be younger than the timestamp can be, whose key is online and lives for days, is not believed:
    otherwise one mistaken family could move the clock of every agent by years.
    """
    instants = [instant for signed in roles.values() if (instant := _issued(signed)) is not None]
    return max((instant for instant in instants if instant <= _utc(timestamp.expires)), default=None)


def _require_delegated(model: ModelName, path: str, top: TopLevel, family: Metadata[Targets]) -> None:
    """Raise unless top-level targets delegates `path` to this very file: a cache may hold an older one."""
    name = family_role(model)
    roles = (top.targets.delegations.roles or {}) if top.targets.delegations is not None else {}
    role = roles.get(name)
    if role is None or not role.is_delegated_path(path):
        raise Untrusted(f"{path}: expected the catalogue to delegate it to {name}, it does not")
    meta = top.snapshot.meta.get(f"{name}.json")
    if meta is None or meta.version != family.signed.version:
        raise Untrusted(f"{name}: expected the version that the snapshot names, got {family.signed.version}")
    try:
        top.targets.verify_delegate(name, family.signed_bytes, family.signatures)
    except RepositoryError as error:
        raise Untrusted(f"{name}: {error}") from error


def _require_same_content(slot: Slot, target: TargetFile) -> None:
    listed = target.hashes.get("sha256")
    if listed != hex_of(slot.manifest_digest):
        raise Untrusted(
            f"{target.path}: expected the manifest sha256:{listed} of the catalogue, the assignment names "
            f"{slot.manifest_digest}"
        )
    if not 1 <= target.length <= MAX_MANIFEST_BYTES:
        raise Untrusted(f"{target.path}: expected a manifest of 1 to {MAX_MANIFEST_BYTES} bytes, got {target.length}")


def _release_floor(model: ModelName, family: Targets) -> int:
    floor = family.unrecognized_fields.get(RELEASE_FLOOR)
    if not isinstance(floor, int) or isinstance(floor, bool) or floor < 0:
        raise Untrusted(f"{family_role(model)}: expected a number in {RELEASE_FLOOR}, got {str(floor)[:80]!r}")
    return floor


def _director_key(key_id: str, text: object) -> bytes:
    try:
        raw = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != 32 or hashlib.sha256(raw).hexdigest() != key_id:
        raise Untrusted(
            f"catalogue: expected 32 bytes in hexadecimal and their SHA-256, got another key {key_id[:80]!r}"
        )
    return raw


def _issued(signed: Signed) -> datetime | None:
    text = signed.unrecognized_fields.get(ISSUED)
    if text is None:
        return None
    try:
        return _utc(datetime.fromisoformat(text))
    except (TypeError, ValueError, OverflowError):
        raise Untrusted(f"{signed.type}: expected an ISO 8601 instant in {ISSUED}, got {str(text)[:80]!r}") from None


def _utc(instant: datetime) -> datetime:
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
