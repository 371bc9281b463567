"""A18 on a real controller's disk: all of it but the keys of root and targets is the thief's, who tries everything.

The agent judges with its own verification, of files that the thief serves as he likes; what it may not fetch it cannot
install. What a thief can do is choose among what the offline keys have listed.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface

from controller.foundation import Foundation, lay
from controller.settings import Settings
from controller.signing.director import Director
from controller.signing.edition import AnyMetadata, add_signature, parse_metadata
from controller.signing.keys import KeyFiles, KeyRing, PrivateKey, Signer
from controller.signing.model import KeyRole
from controller.storage.catalogue import SqlCatalogueStore
from core.catalogue import DIRECTOR_KEYS, family_role, target_path
from core.clock import SystemClock
from core.errors import InvalidRequest, Unavailable, Untrusted
from core.fleet_state import (
    ASSIGNMENT_CONTEXT,
    NO_CATALOGUE,
    AgentHello,
    DesiredState,
    MetadataFile,
    Position,
    SignedAssignment,
    Slot,
)
from core.ids import AgentId, SiteId
from edge_agent.trust.admission import ROOT, admit
from edge_agent.trust.question import Answer, Question
from edge_agent.trust.terms import ManifestTerms
from tests.support.catalogues import METER, Release, made_release
from tests.support.trusting_device import opened

AGENT = AgentId("gate-1")
CLOCK = SystemClock()
WITHDRAWN, LISTED, NEWER = (made_release(METER, version) for version in (1, 2, 3))
EVIL = made_release(METER, 7, content=b"evil")
FAMILY = family_role(METER)
OFFLINE = (KeyRole.ROOT, KeyRole.TARGETS)


class ServedFiles(FetcherInterface):
    """A catalogue served file by file."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2]
        if name not in self._files:
            raise DownloadHTTPError(name, 404)
        return iter([self._files[name]])


@dataclass
class Device:
    """An agent that enrolled in good time, with what it accepted since."""

    folder: Path

    def judge(self, signed: SignedAssignment, served: Mapping[str, bytes], *, after: timedelta = timedelta()) -> Answer:
        question = Question(self.folder, AGENT, signed)
        return admit(question, now=CLOCK.now() + after, live=opened(ServedFiles(served)))


@dataclass
class Thief:
    """Has the database and every key that is left, and signs whatever he likes with all of them."""

    foundation: Foundation
    director: Director
    keys: KeyRing
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def keys_folder(self) -> Path:
        return Path(self.keys.places[0].removeprefix("files in "))

    @property
    def signers(self) -> list[Signer]:
        return [signer for role in KeyRole for signer in self.keys.signers(role).values()]

    async def copy_catalogue(self) -> None:
        """Take every file that the controller would serve."""
        versions = {file.role: file.version for file in await self._store.newest()}
        for role, version in versions.items():
            if role == "timestamp":
                self.files["timestamp.json"] = await self.foundation.catalogue.metadata("timestamp.json")
            else:
                for each in range(1, version + 1):
                    self.files[f"{each}.{role}.json"] = (await self._store.file(role, each)).content

    @property
    def _store(self) -> SqlCatalogueStore:
        return SqlCatalogueStore(self.foundation.database)

    def newest(self, role: str) -> AnyMetadata:
        if role == "timestamp":
            return parse_metadata(self.files["timestamp.json"], where=role)
        version = max(int(name.partition(".")[0]) for name in self.files if name.endswith(f".{role}.json"))
        return parse_metadata(self.files[f"{version}.{role}.json"], where=role)

    def publish(self, role: str, metadata: AnyMetadata) -> None:
        """Sign the next version of a role with every key there is, and list it in a new snapshot and timestamp."""
        self._sign(role, metadata)
        if role == "root":
            return
        snapshot = self.newest("snapshot")
        assert isinstance(snapshot.signed, Snapshot)
        snapshot.signed.meta[f"{role}.json"].version = metadata.signed.version
        self.restate(snapshot)

    def restate(self, snapshot: AnyMetadata) -> None:
        self._sign("snapshot", snapshot)
        timestamp = self.newest("timestamp")
        assert isinstance(timestamp.signed, Timestamp)
        timestamp.signed.snapshot_meta.version = snapshot.signed.version
        timestamp.signed.snapshot_meta.length = timestamp.signed.snapshot_meta.hashes = None
        self._sign("timestamp", timestamp)

    def _sign(self, role: str, metadata: AnyMetadata) -> None:
        metadata.signed.version += 1
        metadata.signed.expires += timedelta(days=1)
        metadata.signatures.clear()
        for signer in self.signers:
            add_signature(metadata, signer.public_key.key_id, signer)
        prefix = "" if role == "timestamp" else f"{metadata.signed.version}."
        self.files[f"{prefix}{role}.json"] = metadata.to_bytes()

    async def asks_for(self, slot: Slot, *, agent: AgentId = AGENT) -> SignedAssignment:
        """Sign an assignment with the director's key; what rides along is all that the thief serves."""
        desired = DesiredState(agent, Position(1, 99), CLOCK.now(), (slot,))
        hello = AgentHello(agent, SiteId("north"), "1.0", "boot", Position(0, 0), (), NO_CATALOGUE)
        signed = await self.director.signed(desired, hello)
        return replace(signed, catalogue=tuple(MetadataFile(name, content) for name, content in self.files.items()))

    # ---- what he tries ----------------------------------------------------------------------------------------

    async def release_as_the_controller_would(self) -> SignedAssignment:
        await self.foundation.catalogue.release([EVIL])
        return await self.asks_for(EVIL.slot)

    async def list_it_in_the_family(self) -> SignedAssignment:
        family = self.newest(FAMILY)
        _list(family, EVIL)
        self.publish(FAMILY, family)
        return await self.asks_for(EVIL.slot)

    async def list_it_in_targets(self) -> SignedAssignment:
        targets = self.newest("targets")
        _list(targets, EVIL)
        self.publish("targets", targets)
        return await self.asks_for(EVIL.slot)

    async def change_the_family_without_signing(self) -> SignedAssignment:
        """Write into the signed file, and list what came of it."""
        family = self.newest(FAMILY)
        _list(family, EVIL)
        self.files[f"{family.signed.version}.{FAMILY}.json"] = family.to_bytes()
        return await self.asks_for(EVIL.slot)

    async def bring_back_the_family_of_before(self) -> SignedAssignment:
        """List an older family, genuine and unexpired, in which the withdrawn version still stands."""
        snapshot = self.newest("snapshot")
        assert isinstance(snapshot.signed, Snapshot)
        snapshot.signed.meta[f"{FAMILY}.json"].version = 1
        self.restate(snapshot)
        return await self.asks_for(WITHDRAWN.slot)

    async def ask_for_the_withdrawn(self) -> SignedAssignment:
        return await self.asks_for(WITHDRAWN.slot)

    async def name_a_director_of_his_own(self) -> SignedAssignment:
        own = PrivateKey.generate()
        targets = self.newest("targets")
        listed = dict(targets.signed.unrecognized_fields[DIRECTOR_KEYS])
        targets.signed.unrecognized_fields[DIRECTOR_KEYS] = {**listed, own.public_key.director_id: own.public_key.hex}
        self.publish("targets", targets)
        signed = await self.asks_for(LISTED.slot)
        signature = own.sign(ASSIGNMENT_CONTEXT + signed.payload)
        return replace(signed, signature=signature, key_id=own.public_key.director_id)

    async def begin_at_a_root_of_his_own(self) -> SignedAssignment:
        """State that his keys are the keys of every role."""
        root = self.newest("root")
        assert isinstance(root.signed, Root)
        own = PrivateKey.generate().public_key
        for role in ("root", "targets"):
            root.signed.add_key(own.to_tuf(), role)
            root.signed.roles[role].threshold = 1
        self.publish("root", root)
        return await self.list_it_in_the_family()

    async def send_what_is_for_another_agent(self) -> SignedAssignment:
        return await self.asks_for(LISTED.slot, agent=AgentId("gate-2"))

    async def swap_the_manifest(self) -> SignedAssignment:
        """Name other bytes by the name of a listed version."""
        return await self.asks_for(replace(EVIL.slot, version=LISTED.version))


def _list(metadata: AnyMetadata, release: Release) -> None:
    assert isinstance(metadata.signed, Targets)
    path = target_path(release.model, release.version, release.variant)
    metadata.signed.targets[path] = TargetFile.from_data(path, release.manifest.to_bytes())


@pytest.fixture
async def stolen(tmp_path: Path) -> AsyncIterator[tuple[Thief, Device]]:
    settings = Settings(data_dir=tmp_path / "controller")
    device = Device(tmp_path / "agent" / "trust")
    device.folder.mkdir(parents=True)
    async with AsyncExitStack() as stack:
        foundation = await lay(settings, stack, clock=CLOCK)
        (device.folder / ROOT).write_bytes(await foundation.trust_root())
        for release in (WITHDRAWN, LISTED, NEWER):
            await foundation.catalogue.release([release])
        await foundation.catalogue.revoke(METER, below=LISTED.version)
    for role in OFFLINE:
        (settings.keys_dir / role).rename(tmp_path / role)
    async with AsyncExitStack() as stack:
        foundation = await lay(settings, stack, clock=CLOCK)
        thief = Thief(foundation, Director(foundation.catalogue, clock=CLOCK), KeyRing(KeyFiles(settings.keys_dir)))
        await thief.copy_catalogue()
        yield thief, device


@pytest.mark.parametrize(
    "attempt",
    [
        Thief.release_as_the_controller_would,
        Thief.list_it_in_the_family,
        Thief.list_it_in_targets,
        Thief.change_the_family_without_signing,
        Thief.bring_back_the_family_of_before,
        Thief.ask_for_the_withdrawn,
        Thief.name_a_director_of_his_own,
        Thief.begin_at_a_root_of_his_own,
        Thief.send_what_is_for_another_agent,
        Thief.swap_the_manifest,
    ],
)
async def test_A18_a_thief_of_the_whole_disk_installs_nothing_that_is_not_listed(
    stolen: tuple[Thief, Device], attempt: Callable[[Thief], Awaitable[SignedAssignment]]
) -> None:
    thief, device = stolen
    device.judge(await thief.asks_for(NEWER.slot), thief.files)
    signed = await attempt(thief)
    for rides_along in (signed, replace(signed, catalogue=())):
        with pytest.raises((Untrusted, InvalidRequest, Unavailable)):
            device.judge(rides_along, thief.files)


async def test_A18_what_a_thief_can_do_is_choose_among_what_is_listed(stolen: tuple[Thief, Device]) -> None:
    thief, device = stolen
    for release in (NEWER, LISTED):
        statement = device.judge(await thief.asks_for(release.slot), thief.files).allowed[release.manifest_digest]
        ManifestTerms(statement.length_bytes, statement.release_floor, frozenset()).require(release.manifest)


async def test_A18_without_the_offline_keys_the_catalogue_ends(stolen: tuple[Thief, Device]) -> None:
    """Snapshot and timestamp can be stated anew for ever; what they list cannot."""
    thief, device = stolen
    for _ in range(120):
        thief.restate(thief.newest("snapshot"))
    signed = await thief.asks_for(NEWER.slot)
    device.judge(signed, thief.files)
    with pytest.raises((Untrusted, Unavailable)):
        device.judge(signed, thief.files, after=timedelta(days=91))


async def test_A18_the_owner_recovers_with_the_offline_keys(stolen: tuple[Thief, Device], tmp_path: Path) -> None:
    thief, device = stolen
    keys_dir = thief.keys_folder
    for role in OFFLINE:
        (tmp_path / role).rename(keys_dir / role)
    catalogue = thief.foundation.catalogue
    for role in (KeyRole.SNAPSHOT, KeyRole.TIMESTAMP, KeyRole.DIRECTOR):
        await catalogue.rotate(role)
    await thief.copy_catalogue()
    assert NEWER.manifest_digest in device.judge(await thief.asks_for(NEWER.slot), thief.files).allowed
