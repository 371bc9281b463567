"""Signatures that do not count, chains of keys, and roles that reach beyond their own: A08 to A10."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, TargetFile

from core.catalogue import DIRECTOR_KEYS
from core.errors import Untrusted
from edge_agent.trust.accepted import load_accepted
from tests.support.catalogue_side import CatalogueSide, DirectorKey, path_of
from tests.support.trusting_device import ROLES, TrustingDevice, asks_for, desired_of, name_of, release_of

MADE = release_of()


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


# ---- A08 to A10: other keys ------------------------------------------------------------------------------------------


def _unsigned(side: CatalogueSide, role: str) -> None:
    name = name_of(side, role)
    metadata: Metadata[Any] = Metadata.from_bytes(side.files[name])
    metadata.signatures.clear()
    side.files[name] = metadata.to_bytes()


def _wrong_key(side: CatalogueSide, role: str) -> None:
    name = name_of(side, role)
    metadata: Metadata[Any] = Metadata.from_bytes(side.files[name])
    metadata.sign(CatalogueSide().keys["root"][0])
    side.files[name] = metadata.to_bytes()


def _wrong_key_in_the_right_name(side: CatalogueSide, role: str) -> None:
    name = name_of(side, role)
    document = json.loads(side.files[name])
    document["signatures"][0]["sig"] = "00" * 64
    side.files[name] = json.dumps(document).encode()


def _doubled_signature(side: CatalogueSide, role: str) -> None:
    name = name_of(side, role)
    document = json.loads(side.files[name])
    document["signatures"] *= 2
    side.files[name] = json.dumps(document).encode()


def _changed_after_signing(side: CatalogueSide, role: str) -> None:
    name = name_of(side, role)
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
        device.admits_served(asks_for(side, MADE))


def test_A08_a_root_below_its_threshold_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    side.root.version += 1
    side.put("2.root.json", side.root, side.keys["root"][:1])
    with pytest.raises(Untrusted, match="1/2"):
        device.admits_served(asks_for(side, MADE))


def test_A08_one_root_key_listed_twice_does_not_count_twice(side: CatalogueSide, device: TrustingDevice) -> None:
    side.root.version += 1
    side.put("2.root.json", side.root, side.keys["root"][:1])
    document = json.loads(side.files["2.root.json"])
    document["signed"]["roles"]["root"]["keyids"] *= 2
    side.files["2.root.json"] = json.dumps(document).encode()
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side, MADE))


def test_A08_an_assignment_by_a_key_that_the_catalogue_does_not_list_is_refused(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    with pytest.raises(Untrusted, match="director keys"):
        device.admits(side.assignment(desired_of(MADE, now=side.now), by=DirectorKey()))


def test_A08_an_assignment_whose_signature_is_of_something_else_is_refused(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    signed = asks_for(side, MADE)
    other = asks_for(side, MADE, generation=2)
    for forged in (replace(signed, payload=other.payload), replace(signed, signature=b""), replace(signed, key_id="")):
        with pytest.raises(Untrusted):
            device.admits(forged)


def test_A09_a_device_that_was_offline_follows_a_chain_of_key_rotations(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    for role, count in [("root", 3), ("timestamp", 1), ("root", 3), ("targets", 1), ("root", 3), ("snapshot", 1)]:
        side.rotate(role, count=count)
    side.publish()
    signed = asks_for(side, MADE)
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
        device.admits_served(asks_for(side, MADE))


def test_A09_a_root_may_not_skip_a_version(side: CatalogueSide, device: TrustingDevice) -> None:
    side.rotate("root", count=3)
    side.rotate("root", count=3)
    side.files["2.root.json"] = side.files["3.root.json"]
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side, MADE))


def test_A09_a_rotated_director_key_is_no_director_any_more(side: CatalogueSide, device: TrustingDevice) -> None:
    device.admits_served(asks_for(side, MADE))
    stolen, side.director = side.director, DirectorKey()
    side.targets.unrecognized_fields[DIRECTOR_KEYS] = {side.director.key_id: side.director.raw.hex()}
    side.publish()
    with pytest.raises(Untrusted, match="director keys"):
        device.admits(side.assignment(desired_of(MADE, now=side.now), by=stolen))
    assert MADE.digest in device.admits(asks_for(side, MADE)).allowed


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
    device.admits_served(asks_for(side, MADE))
    assert side.targets.delegations is not None
    assert side.targets.delegations.roles is not None
    del side.targets.delegations.roles["family-digits"]
    side.publish()
    with pytest.raises(Untrusted, match="delegate"):
        device.admits_served(asks_for(side, MADE))
