"""Attacks on what may be installed, by the ids of the design's table. A refusal is an exception: nothing is fetched."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, TargetFile
from tuf.ngclient import FetcherInterface

from core.catalogue import DIRECTOR_KEYS, ISSUED, RELEASE_FLOOR
from core.errors import InvalidRequest, NanofleetError, Unavailable, Untrusted
from core.fleet_state import MetadataFile
from core.fleet_wire import MAX_METADATA_FILES, decode_assignment, encode_assignment
from core.ids import AgentId
from core.manifest import MAX_MANIFEST_BYTES
from edge_agent.trust.accepted import load_accepted
from edge_agent.trust.terms import AdmittedManifests, ManifestTerms
from tests.support.catalogue_side import CatalogueSide, DirectorKey, path_of
from tests.support.trusting_device import TrustingDevice, desired_of, release_of
from tests.support.variants import MadeVariant

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


def asks_for(side: CatalogueSide, *made: MadeVariant, generation: int = 1) -> Any:
    return side.assignment(desired_of(*(made or (MADE,)), now=side.now, generation=generation))


def test_what_is_signed_listed_and_fresh_is_admitted_without_asking_anybody(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    answer = device.admits(asks_for(side))
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
    device.admits_served(asks_for(side))
    replay(side, old)
    with pytest.raises(Untrusted, match=r"version|Expected"):
        device.admits_served(asks_for(side))


def test_A03_other_content_under_the_same_version_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    device.admits_served(asks_for(side))
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
    device.admits_served(asks_for(side))
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
    signed = asks_for(side)
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
    device.admits(asks_for(side))
    assert load_accepted(device.folder).issued_at <= side.now


def test_A04_an_assignment_that_expired_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    with pytest.raises(Untrusted, match="it expired at"):
        device.admits(asks_for(side), after=timedelta(days=2))


@pytest.mark.parametrize("role", ["targets", "family-digits"])
def test_A05_files_of_different_states_do_not_mix(side: CatalogueSide, device: TrustingDevice, role: str) -> None:
    version = side.snapshot.meta[f"{role}.json"].version
    mixed = side.files[f"{version}.{role}.json"]
    side.publish()
    side.files[f"{version + 1}.{role}.json"] = mixed
    with pytest.raises(Untrusted, match="Expected"):
        device.admits_served(asks_for(side))


@pytest.mark.parametrize("role", ["targets", "family-digits"])
def test_A06_a_role_that_was_dropped_from_the_snapshot_is_noticed(
    side: CatalogueSide, device: TrustingDevice, role: str
) -> None:
    device.admits_served(asks_for(side))
    del side.snapshot.meta[f"{role}.json"]
    side.publish_online()
    with pytest.raises(Untrusted, match="missing info"):
        device.admits_served(asks_for(side))


def test_A06_a_device_that_never_saw_the_role_refuses_too(side: CatalogueSide, device: TrustingDevice) -> None:
    del side.snapshot.meta["family-digits.json"]
    side.publish_online()
    with pytest.raises(Untrusted, match="not part of snapshot"):
        device.admits_served(asks_for(side))


def test_A07_a_fast_forward_is_recovered_from_by_new_online_keys(side: CatalogueSide, device: TrustingDevice) -> None:
    honest_timestamp, honest_snapshot = side.timestamp.version, side.snapshot.version
    side.timestamp.version = side.snapshot.version = 2**31
    side.publish_online()
    device.admits_served(asks_for(side))
    side.timestamp.version, side.snapshot.version = honest_timestamp, honest_snapshot
    side.publish_online()
    with pytest.raises(Untrusted, match="must be >="):
        device.admits_served(asks_for(side))
    side.rotate("timestamp")
    side.rotate("snapshot")
    side.publish_online()
    assert MADE.digest in device.admits_served(asks_for(side)).allowed


# ---- A08 to A10: other keys ------------------------------------------------------------------------------------------

ROLES = ["timestamp", "snapshot", "targets", "family-digits"]


def _name_of(side: CatalogueSide, role: str) -> str:
    if role == "timestamp":
        return "timestamp.json"
    version = side.snapshot.version if role == "snapshot" else side.snapshot.meta[f"{role}.json"].version
    return f"{version}.{role}.json"


def _unsigned(side: CatalogueSide, role: str) -> None:
    name = _name_of(side, role)
    metadata: Metadata[Any] = Metadata.from_bytes(side.files[name])
    metadata.signatures.clear()
    side.files[name] = metadata.to_bytes()


def _wrong_key(side: CatalogueSide, role: str) -> None:
    name = _name_of(side, role)
    metadata: Metadata[Any] = Metadata.from_bytes(side.files[name])
    metadata.sign(CatalogueSide().keys["root"][0])
    side.files[name] = metadata.to_bytes()


def _wrong_key_in_the_right_name(side: CatalogueSide, role: str) -> None:
    name = _name_of(side, role)
    document = json.loads(side.files[name])
    document["signatures"][0]["sig"] = "00" * 64
    side.files[name] = json.dumps(document).encode()


def _doubled_signature(side: CatalogueSide, role: str) -> None:
    name = _name_of(side, role)
    document = json.loads(side.files[name])
    document["signatures"] *= 2
    side.files[name] = json.dumps(document).encode()


def _changed_after_signing(side: CatalogueSide, role: str) -> None:
    name = _name_of(side, role)
    document = json.loads(side.files[name])
    document["signed"]["x-more"] = 1
    side.files[name] = json.dumps(document).encode()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "spoil", [_unsigned, _wrong_key, _wrong_key_in_the_right_name, _doubled_signature, _changed_after_signing]
)
def test_A08_a_role_that_its_key_did_not_sign_is_refused(
    side: CatalogueSide, device: TrustingDevice, spoil: Callable[[CatalogueSide, str], None], role: str
) -> None:
    spoil(side, role)
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side))


def test_A08_a_root_below_its_threshold_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    side.root.version += 1
    side.put("2.root.json", side.root, side.keys["root"][:1])
    with pytest.raises(Untrusted, match="1/2"):
        device.admits_served(asks_for(side))


def test_A08_one_root_key_listed_twice_does_not_count_twice(side: CatalogueSide, device: TrustingDevice) -> None:
    side.root.version += 1
    side.put("2.root.json", side.root, side.keys["root"][:1])
    document = json.loads(side.files["2.root.json"])
    document["signed"]["roles"]["root"]["keyids"] *= 2
    side.files["2.root.json"] = json.dumps(document).encode()
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side))


def test_A08_an_assignment_by_a_key_that_the_catalogue_does_not_list_is_refused(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    with pytest.raises(Untrusted, match="director keys"):
        device.admits(side.assignment(desired_of(MADE, now=side.now), by=DirectorKey()))


def test_A08_an_assignment_whose_signature_is_of_something_else_is_refused(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    signed = asks_for(side)
    other = asks_for(side, generation=2)
    for forged in (replace(signed, payload=other.payload), replace(signed, signature=b""), replace(signed, key_id="")):
        with pytest.raises(Untrusted):
            device.admits(forged)


def test_A09_a_device_that_was_offline_follows_a_chain_of_key_rotations(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    for role, count in [("root", 3), ("timestamp", 1), ("root", 3), ("targets", 1), ("root", 3), ("snapshot", 1)]:
        side.rotate(role, count=count)
    side.publish()
    signed = asks_for(side)
    assert MADE.digest in device.admits(signed).allowed
    assert load_accepted(device.folder).versions.root == 7
    assert side.asked == []


def test_A09_a_missing_link_of_the_chain_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    for _ in range(3):
        side.rotate("root", count=3)
    side.rotate("timestamp")
    side.publish()
    del side.files["3.root.json"]
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side))


def test_A09_a_root_may_not_skip_a_version(side: CatalogueSide, device: TrustingDevice) -> None:
    side.rotate("root", count=3)
    side.rotate("root", count=3)
    side.files["2.root.json"] = side.files["3.root.json"]
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side))


def test_A09_a_rotated_director_key_is_no_director_any_more(side: CatalogueSide, device: TrustingDevice) -> None:
    device.admits_served(asks_for(side))
    stolen, side.director = side.director, DirectorKey()
    side.targets.unrecognized_fields[DIRECTOR_KEYS] = {side.director.key_id: side.director.raw.hex()}
    side.publish()
    with pytest.raises(Untrusted, match="director keys"):
        device.admits(side.assignment(desired_of(MADE, now=side.now), by=stolen))
    assert MADE.digest in device.admits(asks_for(side)).allowed


def test_A10_a_family_cannot_release_another_familys_model(side: CatalogueSide, device: TrustingDevice) -> None:
    other = release_of(2)
    side.add_family("faces")
    side.release(other, model="faces")
    side.publish()
    with pytest.raises(Untrusted, match="current target"):
        device.admits_served(asks_for(side, other))


def test_A10_a_role_with_a_wider_pattern_is_no_family(side: CatalogueSide, device: TrustingDevice) -> None:
    """Even signed by the targets key: the floor stands in the family, so only the family may list the model."""
    other = release_of(2, model="faces")
    side.add_family("wide")
    side.delegate("family-wide", paths=["*/*/*.json"], keys=side.keys["family-wide"])
    side.release(other, model="wide")
    side.publish()
    with pytest.raises(Untrusted, match="delegate"):
        device.admits_served(asks_for(side, other))


def test_A10_a_target_in_the_top_level_role_is_no_familys(side: CatalogueSide, device: TrustingDevice) -> None:
    other = release_of(2)
    path = path_of(other.slot)
    side.targets.targets[path] = TargetFile.from_data(path, other.manifest.to_bytes(), ["sha256"])
    side.publish()
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side, other))


def test_A10_a_family_that_is_not_delegated_any_more_says_nothing(side: CatalogueSide, device: TrustingDevice) -> None:
    device.admits_served(asks_for(side))
    assert side.targets.delegations is not None
    assert side.targets.delegations.roles is not None
    del side.targets.delegations.roles["family-digits"]
    side.publish()
    with pytest.raises(Untrusted, match="delegate"):
        device.admits_served(asks_for(side))


# ---- A11 to A13: other forms -----------------------------------------------------------------------------------------


class Endless(FetcherInterface):
    def __init__(self) -> None:
        self.given_bytes = 0

    def _fetch(self, url: str) -> Iterator[bytes]:
        while True:
            self.given_bytes += 1 << 16
            yield bytes(1 << 16)


def test_A11_endless_data_is_cut_off_at_the_bound_of_its_role(side: CatalogueSide, device: TrustingDevice) -> None:
    endless = Endless()
    with pytest.raises(Untrusted, match="exceeding"):
        device.admits(replace(asks_for(side), catalogue=()), live=endless)
    assert endless.given_bytes <= 600_000


@pytest.mark.parametrize("role", ROLES)
def test_A11_an_oversized_file_is_refused(side: CatalogueSide, device: TrustingDevice, role: str) -> None:
    side.files[_name_of(side, role)] += b" " * 5_000_000
    with pytest.raises(Untrusted, match="exceeding"):
        device.admits_served(asks_for(side))


def test_A11_more_metadata_than_was_agreed_is_not_even_decoded(side: CatalogueSide) -> None:
    crowd = tuple(MetadataFile(f"{number}.json", b"") for number in range(MAX_METADATA_FILES + 1))
    with pytest.raises(InvalidRequest, match="at most 64"):
        decode_assignment(encode_assignment(replace(asks_for(side), catalogue=crowd)))


@pytest.mark.parametrize(
    ("name", "of"), [("snapshot", "timestamp"), ("targets", "snapshot"), ("family-digits", "root")]
)
def test_A13_metadata_of_one_type_does_not_pass_for_another(
    side: CatalogueSide, device: TrustingDevice, name: str, of: str
) -> None:
    side.files[_name_of(side, name)] = side.anchor if of == "root" else side.files[_name_of(side, of)]
    with pytest.raises(Untrusted, match="Expected"):
        device.admits_served(asks_for(side))


def test_A13_names_that_lead_elsewhere_write_nothing_elsewhere(
    side: CatalogueSide, device: TrustingDevice, tmp_path: Path
) -> None:
    hostile = ("../escaped.json", "/tmp/escaped.json", "root_history/2.root.json", "metadata/../../escaped.json")
    files = tuple(MetadataFile(name, b"{}") for name in hostile)
    signed = asks_for(side)
    device.admits(replace(signed, catalogue=(*files, *signed.catalogue)))
    assert not list(tmp_path.rglob("*escaped*"))
    assert [path.name for path in (device.folder / "metadata" / "root_history").iterdir()] == ["1.root.json"]


def test_A13_a_delegated_role_named_like_a_path_stays_inside_the_folder(
    side: CatalogueSide, device: TrustingDevice, tmp_path: Path
) -> None:
    assert side.targets.delegations is not None
    side.delegate("../../escaped", paths=["digits/*/*.json"], keys=side.keys["family-digits"])
    roles = side.targets.delegations.roles
    assert roles is not None
    side.targets.delegations.roles = {"../../escaped": roles["../../escaped"], **roles}
    family = side.families["family-digits"]
    side.publish()
    side.put("1...%2F..%2Fescaped.json", family, side.keys["family-digits"])
    with pytest.raises(NanofleetError):
        device.admits_served(asks_for(side))
    assert not list(tmp_path.rglob("escaped*"))


def test_A13_a_delegated_role_may_not_be_named_like_a_top_level_one(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    side.publish()
    name = _name_of(side, "targets")
    document = json.loads(side.files[name])
    document["signed"]["delegations"]["roles"][0]["name"] = "root"
    side.files[name] = json.dumps(document).encode()
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side))


@pytest.mark.parametrize(
    "keys",
    [
        None,
        [],
        {},
        "key",
        {"id": "00"},
        {"00" * 32: "11" * 32},
        {DirectorKey().key_id: 7},
        {f"{number:064x}": "00" * 32 for number in range(17)},
    ],
)
def test_A13_director_keys_of_another_form_are_refused(
    side: CatalogueSide, device: TrustingDevice, keys: object
) -> None:
    side.targets.unrecognized_fields[DIRECTOR_KEYS] = keys
    side.publish()
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side))


@pytest.mark.parametrize("floor", [None, "1", True, -1, [1]])
def test_A13_a_release_floor_of_another_form_is_refused(
    side: CatalogueSide, device: TrustingDevice, floor: object
) -> None:
    side.families["family-digits"].unrecognized_fields[RELEASE_FLOOR] = floor
    side.publish()
    with pytest.raises(Untrusted, match="expected a number"):
        device.admits_served(asks_for(side))


@pytest.mark.parametrize("instant", [7, "soon", ["2026"], "9999-12-31T23:59:59-23:59"])
def test_A13_an_instant_of_another_form_is_refused(
    side: CatalogueSide, device: TrustingDevice, instant: object
) -> None:
    side.targets.unrecognized_fields[ISSUED] = instant
    side.publish()
    with pytest.raises(Untrusted, match="ISO 8601"):
        device.admits_served(asks_for(side))


# ---- A14 and A15: signed, but not for here ---------------------------------------------------------------------------


def test_A14_a_withdrawn_variant_is_not_installed_again(side: CatalogueSide, device: TrustingDevice) -> None:
    device.admits_served(asks_for(side))
    side.families["family-digits"].targets.clear()
    side.publish()
    with pytest.raises(Untrusted, match="withdrawn"):
        device.admits_served(asks_for(side))


def test_A14_a_withdrawn_variant_that_runs_goes_on_running(side: CatalogueSide, device: TrustingDevice) -> None:
    side.families["family-digits"].targets.clear()
    side.publish()
    assert device.admits(asks_for(side), running=[MADE.digest]).allowed == {}


def test_A14_a_listed_variant_below_the_floor_is_not_installed(side: CatalogueSide, device: TrustingDevice) -> None:
    side.families["family-digits"].unrecognized_fields[RELEASE_FLOOR] = 2
    side.publish()
    statement = device.admits_served(asks_for(side)).allowed[MADE.digest]
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

    def unsigned_model(self) -> Any:
        return asks_for(self.side, release_of(7))

    def own_family(self) -> Any:
        """Sign the family by a key of one's own, and list it in a snapshot that the stolen key signs."""
        family, made = self.side.families["family-digits"], release_of(7)
        self.side.release(made)
        family.version += 1
        self.side.put(f"{family.version}.family-digits.json", family, self.own.keys["targets"])
        self.side.snapshot.meta["family-digits.json"].version = family.version
        self.side.publish_online()
        return asks_for(self.side, made)

    def online_keys_for_targets(self) -> Any:
        """Sign targets by the stolen online keys."""
        made, targets = release_of(7), self.side.targets
        targets.targets[path_of(made.slot)] = TargetFile.from_data(path_of(made.slot), made.manifest.to_bytes())
        targets.version += 1
        self.side.put(f"{targets.version}.targets.json", targets, [key for keys in self.keys.values() for key in keys])
        self.side.snapshot.meta["targets.json"].version = targets.version
        self.side.publish_online()
        return asks_for(self.side, made)

    def new_director_key(self) -> Any:
        return self.side.assignment(desired_of(MADE, now=self.side.now), by=DirectorKey())

    def new_root(self) -> Any:
        """Sign a root of one's own by one of the three old keys, found on a machine where it should not have been."""
        self.own.root.version = 2
        self.own.put("2.root.json", self.own.root, [*self.own.keys["root"], self.side.keys["root"][0]])
        return self.other_repository()

    def other_repository(self) -> Any:
        """Serve a whole catalogue of one's own."""
        made = release_of(7)
        self.own.add_family("digits")
        self.own.release(made)
        self.own.publish()
        self.side.files = dict(self.own.files)
        return self.own.assignment(desired_of(made, now=self.side.now))

    def older_targets(self) -> Any:
        """List, in a new snapshot, the family as it was before it withdrew something."""
        self.side.snapshot.meta["family-digits.json"].version -= 1
        self.side.publish_online()
        return asks_for(self.side, WITHDRAWN)

    def other_agents_assignment(self) -> Any:
        return self.side.assignment(desired_of(MADE, now=self.side.now, agent=AgentId("gate-2")))

    def expired_assignment(self) -> Any:
        return self.side.assignment(desired_of(MADE, now=self.side.now - timedelta(days=9)))

    def endless_assignment(self) -> Any:
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
    side: CatalogueSide, device: TrustingDevice, attempt: Callable[[Thief], Any], rides_along: bool
) -> None:
    side.release(WITHDRAWN)
    side.publish()
    del side.families["family-digits"].targets[path_of(WITHDRAWN.slot)]
    side.publish()
    device.admits(asks_for(side))
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


# ---- A20: the catalogue's half ---------------------------------------------------------------------------------------


def test_A20_metadata_that_nests_without_end_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    side.files["timestamp.json"] = b"[" * 16_000
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side))


@pytest.mark.parametrize("length", [MAX_MANIFEST_BYTES + 1, 0])
def test_A20_a_manifest_out_of_bounds_is_not_even_asked_for(
    side: CatalogueSide, device: TrustingDevice, length: int
) -> None:
    side.families["family-digits"].targets[path_of(MADE.slot)].length = length
    side.publish()
    with pytest.raises(Untrusted, match="expected a manifest of 1 to"):
        device.admits_served(asks_for(side))


def test_A20_a_target_without_a_sha256_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    path = path_of(MADE.slot)
    side.families["family-digits"].targets[path] = TargetFile.from_data(path, MADE.manifest.to_bytes(), ["sha512"])
    side.publish()
    with pytest.raises(Untrusted, match="sha256:None"):
        device.admits_served(asks_for(side))


def test_A20_poisoned_files_that_ride_along_do_not_keep_good_ones_from_being_fetched(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    signed = asks_for(side)
    poison = tuple(MetadataFile(file.name, b"\x00" * 64) for file in signed.catalogue)
    assert MADE.digest in device.admits(replace(signed, catalogue=poison), live=side).allowed
    assert device.admits(replace(signed, catalogue=poison), running=[MADE.digest], live=side).allowed == {}
