"""Metadata without end or of another form: A11, A13 and the catalogue's half of A20."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface

from core.catalogue import DIRECTOR_KEYS, ISSUED, RELEASE_FLOOR
from core.errors import InvalidRequest, NanofleetError, Untrusted
from core.fleet_state import MetadataFile
from core.fleet_wire import MAX_METADATA_FILES, decode_assignment, encode_assignment
from core.manifest import MAX_MANIFEST_BYTES
from tests.support.catalogue_side import CatalogueSide, DirectorKey, path_of
from tests.support.trusting_device import ROLES, TrustingDevice, asks_for, name_of, release_of

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
        device.admits(replace(asks_for(side, MADE), catalogue=()), live=endless)
    assert endless.given_bytes <= 600_000


@pytest.mark.parametrize("role", ROLES)
def test_A11_an_oversized_file_is_refused(side: CatalogueSide, device: TrustingDevice, role: str) -> None:
    side.files[name_of(side, role)] += b" " * 5_000_000
    with pytest.raises(Untrusted, match="exceeding"):
        device.admits_served(asks_for(side, MADE))


def test_A11_more_metadata_than_was_agreed_is_not_even_decoded(side: CatalogueSide) -> None:
    crowd = tuple(MetadataFile(f"{number}.json", b"") for number in range(MAX_METADATA_FILES + 1))
    with pytest.raises(InvalidRequest, match="at most 64"):
        decode_assignment(encode_assignment(replace(asks_for(side, MADE), catalogue=crowd)))


@pytest.mark.parametrize(
    ("name", "of"), [("snapshot", "timestamp"), ("targets", "snapshot"), ("family-digits", "root")]
)
def test_A13_metadata_of_one_type_does_not_pass_for_another(
    side: CatalogueSide, device: TrustingDevice, name: str, of: str
) -> None:
    side.files[name_of(side, name)] = side.anchor if of == "root" else side.files[name_of(side, of)]
    with pytest.raises(Untrusted, match="Expected"):
        device.admits_served(asks_for(side, MADE))


def test_A13_names_that_lead_elsewhere_write_nothing_elsewhere(
    side: CatalogueSide, device: TrustingDevice, tmp_path: Path
) -> None:
    hostile = ("../escaped.json", "/tmp/escaped.json", "root_history/2.root.json", "metadata/../../escaped.json")
    files = tuple(MetadataFile(name, b"{}") for name in hostile)
    signed = asks_for(side, MADE)
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
        device.admits_served(asks_for(side, MADE))
    assert not list(tmp_path.rglob("escaped*"))


def test_A13_a_delegated_role_may_not_be_named_like_a_top_level_one(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    side.publish()
    name = name_of(side, "targets")
    document = json.loads(side.files[name])
    document["signed"]["delegations"]["roles"][0]["name"] = "root"
    side.files[name] = json.dumps(document).encode()
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side, MADE))


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
        device.admits_served(asks_for(side, MADE))


@pytest.mark.parametrize("floor", [None, "1", True, -1, [1]])
def test_A13_a_release_floor_of_another_form_is_refused(
    side: CatalogueSide, device: TrustingDevice, floor: object
) -> None:
    side.families["family-digits"].unrecognized_fields[RELEASE_FLOOR] = floor
    side.publish()
    with pytest.raises(Untrusted, match="expected a number"):
        device.admits_served(asks_for(side, MADE))


@pytest.mark.parametrize("instant", [7, "soon", ["2026"], "9999-12-31T23:59:59-23:59"])
def test_A13_an_instant_of_another_form_is_refused(
    side: CatalogueSide, device: TrustingDevice, instant: object
) -> None:
    side.targets.unrecognized_fields[ISSUED] = instant
    side.publish()
    with pytest.raises(Untrusted, match="ISO 8601"):
        device.admits_served(asks_for(side, MADE))


# ---- A20: the catalogue's half ---------------------------------------------------------------------------------------


def test_A20_metadata_that_nests_without_end_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    side.files["timestamp.json"] = b"[" * 16_000
    with pytest.raises(Untrusted):
        device.admits_served(asks_for(side, MADE))


@pytest.mark.parametrize("length", [MAX_MANIFEST_BYTES + 1, 0])
def test_A20_a_manifest_out_of_bounds_is_not_even_asked_for(
    side: CatalogueSide, device: TrustingDevice, length: int
) -> None:
    side.families["family-digits"].targets[path_of(MADE.slot)].length = length
    side.publish()
    with pytest.raises(Untrusted, match="expected a manifest of 1 to"):
        device.admits_served(asks_for(side, MADE))


def test_A20_a_target_without_a_sha256_is_refused(side: CatalogueSide, device: TrustingDevice) -> None:
    path = path_of(MADE.slot)
    side.families["family-digits"].targets[path] = TargetFile.from_data(path, MADE.manifest.to_bytes(), ["sha512"])
    side.publish()
    with pytest.raises(Untrusted, match="sha256:None"):
        device.admits_served(asks_for(side, MADE))


def test_A20_poisoned_files_that_ride_along_do_not_keep_good_ones_from_being_fetched(
    side: CatalogueSide, device: TrustingDevice
) -> None:
    signed = asks_for(side, MADE)
    poison = tuple(MetadataFile(file.name, b"\x00" * 64) for file in signed.catalogue)
    assert MADE.digest in device.admits(replace(signed, catalogue=poison), live=side).allowed
    assert device.admits(replace(signed, catalogue=poison), running=[MADE.digest], live=side).allowed == {}
