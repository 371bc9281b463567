"""Attacks on what may be installed, by the ids of the design's table. A refusal is an exception: nothing is fetched."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import TargetFile

from core.catalogue import RELEASE_FLOOR
from core.errors import InvalidRequest, Unavailable, Untrusted
from core.fleet_state import SignedAssignment
from core.ids import AgentId
from edge_agent.trust.accepted import load_accepted
from edge_agent.trust.terms import AdmittedManifests, ManifestTerms
from tests.support.catalogue_side import CatalogueSide, DirectorKey, path_of
from tests.support.trusting_device import TrustingDevice, asks_for, desired_of, release_of

MADE = release_of()
# What was listed once, and is not any more.
WITHDRAWN = release_of(3)


@pytest.fixture
def side() -> CatalogueSide:
    side = CatalogueSide()
    side.add_family("digits")
    side.release(MADE)
    side.publish()
    return side


@pytest.fixture
def device(tmp_path: Path, side: CatalogueSide) -> TrustingDevice:
    return TrustingDevice(tmp_path / "trust", side)


def test_what_is_signed_listed_and_fresh_is_admitted_without_asking_anybody(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    answer = device.admits(asks_for(side, MADE))
    assert answer.allowed[MADE.digest].length_bytes == len(MADE.manifest.to_bytes())
    assert answer.allowed[MADE.digest].release_floor == 1
    assert side.asked == []


# ---- A01 to A03: other content -------------------------------------------------------------------------------------


def test_A01_an_artifact_swapped_on_the_server_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    swapped = release_of(1, counter=9)
    with pytest.raises(Untrusted, match="expected the manifest"):
        device.admits_served(asks_for(side, swapped))


def _replay_timestamp(side: CatalogueSide, old: dict[str, bytes]) -> None:
    side.files["timestamp.json"] = old["timestamp.json"]


def _replay_snapshot(side: CatalogueSide, old: dict[str, bytes]) -> None:
    """What the timestamp's key makes possible: a new timestamp for an old snapshot."""
    side.snapshot.version -= 1
    side.timestamp.version += 1
    side.timestamp.snapshot_meta.version = side.snapshot.version
    side.put("timestamp.json", side.timestamp, side.keys["timestamp"])
    side.files[f"{side.snapshot.version}.snapshot.json"] = old[f"{side.snapshot.version}.snapshot.json"]


def _replay_targets(side: CatalogueSide, old: dict[str, bytes]) -> None:
    """What both online keys make possible: a new snapshot that lists old targets."""
    side.snapshot.meta["targets.json"].version -= 1
    side.publish_online()


def _replay_family(side: CatalogueSide, old: dict[str, bytes]) -> None:
    side.snapshot.meta["family-digits.json"].version -= 1
    side.publish_online()


@pytest.mark.parametrize("replay", [_replay_timestamp, _replay_snapshot, _replay_targets, _replay_family])
def test_A02_old_metadata_that_is_replayed_is_refused(
    side: CatalogueSide, device: TrustingDevice, replay: Callable[[CatalogueSide, dict[str, bytes]], None]
) -> None:
    old = dict(side.files)
    side.publish()
    device.admits_served(asks_for(side, MADE))
    replay(side, old)
    with pytest.raises(Untrusted, match=r"version|Expected"):
        device.admits_served(asks_for(side, MADE))


@pytest.mark.parametrize("is_emptied", [True, False])
def test_A02_a_cache_that_was_lost_is_no_way_back_to_older_metadata(
    side: CatalogueSide, device: TrustingDevice, is_emptied: bool
) -> None:
    old = dict(side.files)
    side.publish()
    device.admits_served(asks_for(side, MADE))
    for path in (device.folder / "metadata").glob("*.json"):
        path.unlink()
        if is_emptied:
            path.touch()
        else:
            path.mkdir()
    newest = dict(side.files)
    side.files.update(old)
    with pytest.raises(Untrusted, match="as were accepted before"):
        device.admits_served(replace(asks_for(side, MADE), catalogue=()))
    side.files.update(newest)
    device.admits_served(asks_for(side, MADE))


def test_A03_other_content_under_the_same_version_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    device.admits_served(asks_for(side, MADE))
    other = release_of(1, counter=2)
    side.release(other)
    family = side.families["family-digits"]
    side.put(f"{family.version}.family-digits.json", family, side.keys["family-digits"])
    with pytest.raises(Untrusted, match="expected the manifest"):
        device.admits_served(asks_for(side, other))


# ---- A04 to A07: other times -----------------------------------------------------------------------------------------


def test_A04_metadata_that_is_frozen_installs_nothing_once_it_expires(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    device.admits_served(asks_for(side, MADE))
    desired = replace(desired_of(release_of(), now=side.now), expires_at=side.now + timedelta(days=30))
    with pytest.raises(Unavailable, match="timestamp expired"):
        device.admits_served(side.director.signed(desired), after=timedelta(days=8))


def test_A04_metadata_that_had_expired_before_it_came_installs_nothing(tmp_path: Path) -> None:
    side = CatalogueSide()
    old = CatalogueSide(now=side.now - timedelta(days=30))
    old.add_family("digits")
    old.release(MADE)
    old.publish()
    device = TrustingDevice(tmp_path, old)
    desired = replace(desired_of(MADE, now=side.now))
    with pytest.raises(Unavailable, match="expired"):
        device.admits_served(old.director.signed(desired), after=timedelta(days=30))


def test_A04_a_clock_set_back_does_not_revive_what_has_expired(side: CatalogueSide, device: TrustingDevice) -> None:
    side.now += timedelta(days=20)
    side.issue(side.targets)
    side.timestamp.expires = side.snapshot.expires = side.now + timedelta(days=1)
    side.publish()
    signed = asks_for(side, MADE)
    assert device.admits(signed).clock_behind_s == 0
    answer = device.admits(signed, after=timedelta(days=-3000))
    assert answer.clock_behind_s == pytest.approx(timedelta(days=3000).total_seconds(), abs=1)
    late = replace(desired_of(MADE, now=side.now - timedelta(days=10)))
    with pytest.raises(Untrusted, match="it expired at"):
        device.admits(side.assignment(late), after=timedelta(days=-3000))


def test_A04_metadata_cannot_move_the_floor_beyond_what_the_timestamp_vouches_for(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    side.issue(side.targets, at=side.now + timedelta(days=4000))
    side.publish()
    device.admits(asks_for(side, MADE))
    assert load_accepted(device.folder).issued_at <= side.now


def test_A04_an_assignment_that_expired_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    with pytest.raises(Untrusted, match="it expired at"):
        device.admits(asks_for(side, MADE), after=timedelta(days=2))


@pytest.mark.parametrize("role", ["targets", "family-digits"])
def test_A05_files_of_different_states_do_not_mix(side: CatalogueSide, device: TrustingDevice, role: str) -> None:
    version = side.snapshot.meta[f"{role}.json"].version
    mixed = side.files[f"{version}.{role}.json"]
    side.publish()
    side.files[f"{version + 1}.{role}.json"] = mixed
    with pytest.raises(Untrusted, match="Expected"):
        device.admits_served(asks_for(side, MADE))


@pytest.mark.parametrize("role", ["targets", "family-digits"])
def test_A06_a_role_that_was_dropped_from_the_snapshot_is_noticed(
    side: CatalogueSide, device: TrustingDevice, role: str
) -> None:
    device.admits_served(asks_for(side, MADE))
    del side.snapshot.meta[f"{role}.json"]
    side.publish_online()
    with pytest.raises(Untrusted, match="missing info"):
        device.admits_served(asks_for(side, MADE))


def test_A06_a_device_that_never_saw_the_role_refuses_too(side: CatalogueSide, device: TrustingDevice) -> None:
    del side.snapshot.meta["family-digits.json"]
    side.publish_online()
    with pytest.raises(Untrusted, match="not part of snapshot"):
        device.admits_served(asks_for(side, MADE))


def test_A07_a_fast_forward_is_recovered_from_by_new_online_keys(side: CatalogueSide, device: TrustingDevice) -> None:
    honest_timestamp, honest_snapshot = side.timestamp.version, side.snapshot.version
    side.timestamp.version = side.snapshot.version = 2**31
    side.publish_online()
    device.admits_served(asks_for(side, MADE))
    side.timestamp.version, side.snapshot.version = honest_timestamp, honest_snapshot
    side.publish_online()
    with pytest.raises(Untrusted, match="must be >="):
        device.admits_served(asks_for(side, MADE))
    side.rotate("timestamp")
    side.rotate("snapshot")
    side.publish_online()
    assert MADE.digest in device.admits_served(asks_for(side, MADE)).allowed


# ---- A14 and A15: signed, but not for here ---------------------------------------------------------------------------


def test_A14_a_withdrawn_variant_is_not_installed_again(side: CatalogueSide, device: TrustingDevice) -> None:
    device.admits_served(asks_for(side, MADE))
    side.families["family-digits"].targets.clear()
    side.publish()
    with pytest.raises(Untrusted, match="withdrawn"):
        device.admits_served(asks_for(side, MADE))


def test_A14_a_withdrawn_variant_that_runs_goes_on_running(side: CatalogueSide, device: TrustingDevice) -> None:
    side.families["family-digits"].targets.clear()
    side.publish()
    assert device.admits(asks_for(side, MADE), running=[MADE.digest]).allowed == {}


def test_A14_a_listed_variant_below_the_floor_is_not_installed(side: CatalogueSide, device: TrustingDevice) -> None:
    side.families["family-digits"].unrecognized_fields[RELEASE_FLOOR] = 2
    side.publish()
    statement = device.admits_served(asks_for(side, MADE)).allowed[MADE.digest]
    terms = ManifestTerms(statement.length_bytes, statement.release_floor, frozenset())
    with pytest.raises(Untrusted, match="at least 2, got 1"):
        terms.require(MADE.manifest)


def test_A14_a_variant_without_a_release_counter_is_not_installed() -> None:
    terms = ManifestTerms(1, 0, frozenset())
    with pytest.raises(Untrusted, match="got None"):
        terms.require(MADE.manifest.model_copy(update={"release_counter": None}))


def test_A15_a_variant_for_other_hardware_is_not_installed() -> None:
    made = release_of(requires=("arch:aarch64", "npu:ethos"))
    terms = ManifestTerms(1, 1, frozenset({"arch:x86_64", "npu:ethos"}))
    with pytest.raises(Untrusted, match="arch:aarch64"):
        terms.require(made.manifest)
    ManifestTerms(1, 1, frozenset({"arch:aarch64", "npu:ethos", "rack:7"})).require(made.manifest)


def test_A15_a_manifest_that_nobody_admitted_is_not_installed() -> None:
    admitted = AdmittedManifests(in_force=[])
    with pytest.raises(Untrusted, match="expected a manifest of the admitted assignment"):
        admitted.require(MADE.manifest, MADE.slot)


# ---- A18: everything but the offline keys ----------------------------------------------------------------------------


class Thief:
    """Holds the controller's whole disk and wire: snapshot, timestamp and director keys, and every file."""

    def __init__(self, side: CatalogueSide) -> None:
        self.side = side
        self.keys = {role: side.keys[role] for role in ("snapshot", "timestamp")}
        self.own = CatalogueSide(now=side.now)

    def unsigned_model(self) -> SignedAssignment:
        return asks_for(self.side, release_of(7))

    def own_family(self) -> SignedAssignment:
        """Sign the family by a key of one's own, and list it in a snapshot that the stolen key signs."""
        family, made = self.side.families["family-digits"], release_of(7)
        self.side.release(made)
        family.version += 1
        self.side.put(f"{family.version}.family-digits.json", family, self.own.keys["targets"])
        self.side.snapshot.meta["family-digits.json"].version = family.version
        self.side.publish_online()
        return asks_for(self.side, made)

    def online_keys_for_targets(self) -> SignedAssignment:
        """Sign targets by the stolen online keys."""
        made, targets = release_of(7), self.side.targets
        targets.targets[path_of(made.slot)] = TargetFile.from_data(path_of(made.slot), made.manifest.to_bytes())
        targets.version += 1
        self.side.put(f"{targets.version}.targets.json", targets, [key for keys in self.keys.values() for key in keys])
        self.side.snapshot.meta["targets.json"].version = targets.version
        self.side.publish_online()
        return asks_for(self.side, made)

    def new_director_key(self) -> SignedAssignment:
        return self.side.assignment(desired_of(MADE, now=self.side.now), by=DirectorKey())

    def new_root(self) -> SignedAssignment:
        """Sign a root of one's own by one of the three old keys, found on a machine where it should not have been."""
        self.own.root.version = 2
        self.own.put("2.root.json", self.own.root, [*self.own.keys["root"], self.side.keys["root"][0]])
        return self.other_repository()

    def other_repository(self) -> SignedAssignment:
        """Serve a whole catalogue of one's own."""
        made = release_of(7)
        self.own.add_family("digits")
        self.own.release(made)
        self.own.publish()
        self.side.files = dict(self.own.files)
        return self.own.assignment(desired_of(made, now=self.side.now))

    def older_targets(self) -> SignedAssignment:
        """List, in a new snapshot, the family as it was before it withdrew something."""
        self.side.snapshot.meta["family-digits.json"].version -= 1
        self.side.publish_online()
        return asks_for(self.side, WITHDRAWN)

    def other_agents_assignment(self) -> SignedAssignment:
        return self.side.assignment(desired_of(MADE, now=self.side.now, agent=AgentId("gate-2")))

    def expired_assignment(self) -> SignedAssignment:
        return self.side.assignment(desired_of(MADE, now=self.side.now - timedelta(days=9)))

    def endless_assignment(self) -> SignedAssignment:
        return self.side.assignment(replace(desired_of(MADE, now=self.side.now), expires_at=None))


@pytest.mark.parametrize(
    "attempt",
    [
        Thief.unsigned_model,
        Thief.own_family,
        Thief.online_keys_for_targets,
        Thief.new_director_key,
        Thief.new_root,
        Thief.other_repository,
        Thief.older_targets,
        Thief.other_agents_assignment,
        Thief.expired_assignment,
        Thief.endless_assignment,
    ],
)
@pytest.mark.parametrize("rides_along", [True, False])
def test_A18_a_controller_that_is_taken_over_installs_nothing(
    side: CatalogueSide, device: TrustingDevice, attempt: Callable[[Thief], SignedAssignment], rides_along: bool
) -> None:
    side.release(WITHDRAWN)
    side.publish()
    del side.families["family-digits"].targets[path_of(WITHDRAWN.slot)]
    side.publish()
    device.admits(asks_for(side, MADE))
    signed = attempt(Thief(side))
    if not rides_along:
        signed = replace(signed, catalogue=())
    with pytest.raises((Untrusted, InvalidRequest)):
        device.admits_served(signed)


def test_A18_what_it_can_do_is_ask_for_what_is_listed_and_fits(side: CatalogueSide, device: TrustingDevice) -> None:
    """The director's key chooses among what the offline keys allow; floor and tags still hold."""
    older, foreign = release_of(1, counter=1), release_of(2, counter=5, requires=("arch:aarch64",))
    side.release(older)
    side.release(foreign)
    side.families["family-digits"].unrecognized_fields[RELEASE_FLOOR] = 5
    side.publish()
    for made in (older, foreign):
        statement = device.admits_served(asks_for(side, made)).allowed[made.digest]
        terms = ManifestTerms(statement.length_bytes, statement.release_floor, frozenset({"arch:x86_64"}))
        with pytest.raises(Untrusted):
            terms.require(made.manifest)
