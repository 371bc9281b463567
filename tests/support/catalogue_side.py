"""The catalogue's side, in memory: every key, every role, and whatever an attacker with some of the keys would publish.

Built on python-tuf's Metadata API alone, so that it shares no code with the controller's signing. Edit the roles, then
`publish`; `files` is what a server would offer, by name, all versions of them.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.ngclient import FetcherInterface

from core.catalogue import DIRECTOR_KEYS, ISSUED, RELEASE_FLOOR, family_paths, family_role, target_path
from core.fleet_state import ASSIGNMENT_CONTEXT, DesiredState, MetadataFile, SignedAssignment, Slot
from core.fleet_wire import encode_desired
from core.ids import ModelName
from edge_agent.trust.fetchers import BASE_URL
from tests.support.variants import MadeVariant


class DirectorKey:
    """An Ed25519 key that signs assignments, whether the catalogue lists it or not."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.raw = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.key_id = sha256(self.raw).hexdigest()

    def signed(self, desired: DesiredState, files: Sequence[MetadataFile] = ()) -> SignedAssignment:
        payload = encode_desired(desired).SerializeToString()
        return SignedAssignment(payload, self._key.sign(ASSIGNMENT_CONTEXT + payload), self.key_id, tuple(files))


class CatalogueSide(FetcherInterface):
    """A repository with root 2 of 3, one key for each other role, and one family per model; also a fetcher of it."""

    def __init__(self, *, now: datetime | None = None) -> None:
        # The real time by default: python-tuf judges by it too. Whole seconds, as TUF writes them.
        self.now = now = (now or datetime.now(UTC)).replace(microsecond=0)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.director = DirectorKey()
        self.keys: dict[str, list[CryptoSigner]] = {
            "root": _new_keys(3),
            "targets": _new_keys(1),
            "snapshot": _new_keys(1),
            "timestamp": _new_keys(1),
        }
        self.root = Root(1, expires=now + timedelta(days=365), consistent_snapshot=True)
        for role, signers in self.keys.items():
            for signer in signers:
                self.root.add_key(signer.public_key, role)
        self.root.roles["root"].threshold = 2
        self.targets = Targets(1, expires=now + timedelta(days=90))
        self.targets.delegations = Delegations({}, {})
        self.targets.unrecognized_fields[DIRECTOR_KEYS] = {self.director.key_id: self.director.raw.hex()}
        self.families: dict[str, Targets] = {}
        self.snapshot = Snapshot(1, expires=now + timedelta(days=7))
        self.timestamp = Timestamp(1, expires=now + timedelta(days=7))
        for signed in (self.root, self.targets):
            self.issue(signed)
        self.publish_root(bump=False)
        self.publish(bump=False)

    # ---- what the owner of the keys does --------------------------------------------------------------------

    def issue(self, signed: Root | Targets, *, at: datetime | None = None) -> None:
        signed.unrecognized_fields[ISSUED] = (at or self.now).isoformat()

    def add_family(self, model: str, *, floor: int = 1) -> Targets:
        name = family_role(ModelName(model))
        self.keys[name] = _new_keys(1)
        self.delegate(name, paths=[family_paths(ModelName(model))], keys=self.keys[name])
        family = Targets(1, expires=self.now + timedelta(days=90))
        family.unrecognized_fields[RELEASE_FLOOR] = floor
        self.issue(family)
        self.families[name] = family
        return family

    def delegate(self, name: str, *, paths: list[str], keys: Sequence[Signer]) -> None:
        role = DelegatedRole(name, [], 1, True, paths=paths)
        assert self.targets.delegations is not None
        assert self.targets.delegations.roles is not None
        self.targets.delegations.roles[name] = role
        for signer in keys:
            self.targets.add_key(signer.public_key, name)

    def release(self, made: MadeVariant, *, model: str | None = None) -> None:
        """List the variant in the role of its model, or of another `model`."""
        slot = made.slot
        family = self.families[family_role(ModelName(model or slot.model))]
        family.targets[path_of(slot)] = TargetFile.from_data(path_of(slot), made.manifest.to_bytes(), ["sha256"])

    def publish(self, *, bump: bool = True) -> None:
        """Sign everything but root, each a version above the last one."""
        roles: dict[str, Targets] = {"targets": self.targets, **self.families}
        for name, signed in roles.items():
            known = self.snapshot.meta.get(f"{name}.json")
            signed.version += 1 if bump and known is not None else 0
            self.put(f"{signed.version}.{name}.json", signed, self.keys[name])
        self.snapshot.meta = {f"{name}.json": MetaFile(signed.version) for name, signed in roles.items()}
        self.publish_online(bump=bump)

    def publish_online(self, *, bump: bool = True) -> None:
        """Sign snapshot and timestamp only: what whoever takes the controller over can do."""
        self.snapshot.version += bump
        self.put(f"{self.snapshot.version}.snapshot.json", self.snapshot, self.keys["snapshot"])
        self.timestamp.version += bump
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.put("timestamp.json", self.timestamp, self.keys["timestamp"])

    def publish_root(self, *, bump: bool = True, extra: Sequence[Signer] = ()) -> None:
        self.root.version += bump
        self.put(f"{self.root.version}.root.json", self.root, [*self.keys["root"], *extra])

    def rotate(self, role: str, *, count: int = 1) -> None:
        """Give a top-level role new keys, by a root that old and new root keys sign."""
        before = self.keys[role]
        self.keys[role] = _new_keys(count)
        for signer in before:
            self.root.revoke_key(signer.public_key.keyid, role)
        for signer in self.keys[role]:
            self.root.add_key(signer.public_key, role)
        self.publish_root(extra=before if role == "root" else ())

    def put(self, name: str, signed: Root | Targets | Snapshot | Timestamp, keys: Sequence[Signer]) -> None:
        metadata: Metadata[Any] = Metadata(deepcopy(signed))
        for signer in keys:
            metadata.sign(signer, append=True)
        self.files[name] = metadata.to_bytes()

    # ---- what leaves it ---------------------------------------------------------------------------------------

    @property
    def anchor(self) -> bytes:
        return self.files["1.root.json"]

    def all_files(self) -> tuple[MetadataFile, ...]:
        """Return the newest of everything, as it rides along."""
        newest = {
            f"{self.snapshot.version}.snapshot.json",
            "timestamp.json",
            *(f"{meta.version}.{name}" for name, meta in self.snapshot.meta.items()),
        }
        return tuple(
            MetadataFile(name, content)
            for name, content in self.files.items()
            if name in newest or name.endswith(".root.json")
        )

    def assignment(self, desired: DesiredState, *, by: DirectorKey | None = None) -> SignedAssignment:
        return (by or self.director).signed(desired, self.all_files())

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(BASE_URL)
        self.asked.append(name)
        if name not in self.files:
            raise DownloadHTTPError(name, 404)
        return iter((self.files[name],))


def path_of(slot: Slot) -> str:
    return target_path(slot.model, slot.version, slot.variant)


def released(made: MadeVariant, **changes: object) -> MadeVariant:
    """Return the variant with other fields in its manifest, and so another digest."""
    manifest = made.manifest.model_copy(update=changes)
    files = {digest: content for digest, content in made.blobs.items() if digest != made.digest}
    blobs = {manifest.digest(): manifest.to_bytes(), **files}
    return replace(made, manifest=manifest, digest=manifest.digest(), blobs=blobs)


def _new_keys(count: int) -> list[CryptoSigner]:
    return [CryptoSigner.generate_ed25519() for _ in range(count)]
