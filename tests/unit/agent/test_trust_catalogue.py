"""The catalogue on disk: what is kept, what is wiped, and what `tuf-client` makes of it."""

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core.errors import InvalidRequest, NotFound, Untrusted
from core.fleet_state import NO_CATALOGUE
from edge_agent.trust import tuf_client
from edge_agent.trust.accepted import BUILT_AT, Accepted, load_accepted, save_accepted
from edge_agent.trust.catalogue import Catalogue
from tests.support.catalogue_side import CatalogueSide
from tests.support.trusting_device import TrustingDevice, desired_of, release_of

MADE = release_of()


@pytest.fixture
def side() -> CatalogueSide:
    side = CatalogueSide()
    side.add_family("digits")
    side.release(MADE)
    side.publish()
    return side


def test_a_second_refresh_asks_only_for_what_may_be_new(side: CatalogueSide, tmp_path: Path) -> None:
    Catalogue(tmp_path / "m", side.anchor).refresh(side)
    side.asked.clear()
    Catalogue(tmp_path / "m", side.anchor).refresh(side)
    assert side.asked == ["2.root.json", "timestamp.json"]


@pytest.mark.parametrize("name", ["timestamp.json", "root.json", "root_history"])
def test_a_cache_that_cannot_be_opened_is_wiped_and_verified_again(
    side: CatalogueSide, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "m"
    broken = folder / name
    if name == "root_history":
        folder.mkdir()
        broken.write_text("a file where a folder belongs")
    else:
        (broken / "in the way").mkdir(parents=True)
    top = Catalogue(folder, side.anchor).refresh(side)
    assert top.timestamp.version == side.timestamp.version
    assert (folder / "timestamp.json").is_file()


def test_a_file_of_the_cache_that_lost_its_bytes_is_fetched_again(side: CatalogueSide, tmp_path: Path) -> None:
    Catalogue(tmp_path / "m", side.anchor).refresh(side)
    for path in (tmp_path / "m").glob("*.json"):
        path.write_bytes(bytes(path.stat().st_size))
    assert Catalogue(tmp_path / "m", side.anchor).refresh(side).targets == side.targets


def test_a_cache_that_contradicts_the_network_is_not_wiped(side: CatalogueSide, tmp_path: Path) -> None:
    old = side.files["timestamp.json"]
    side.publish()
    Catalogue(tmp_path / "m", side.anchor).refresh(side)
    side.files["timestamp.json"] = old
    with pytest.raises(Untrusted):
        Catalogue(tmp_path / "m", side.anchor).refresh(side)
    assert (tmp_path / "m" / "snapshot.json").is_file()


def test_a_device_without_its_root_trusts_nothing(side: CatalogueSide, tmp_path: Path) -> None:
    device = TrustingDevice(tmp_path, side)
    (tmp_path / "root.json").unlink()
    with pytest.raises(Untrusted, match="enrol again"):
        device.admits(side.assignment(desired_of(MADE, now=side.now)))


def test_what_was_accepted_is_found_again(tmp_path: Path) -> None:
    accepted = Accepted(NO_CATALOGUE._replace(root=2, timestamp=7), datetime(2027, 1, 2, tzinfo=UTC))
    save_accepted(tmp_path, accepted)
    assert load_accepted(tmp_path) == accepted


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"root": "x"}', '{"root":1,"timestamp":1,"issued_at":7}'])
def test_a_broken_record_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "accepted.json").write_text(content)
    assert load_accepted(tmp_path) == Accepted()


def test_the_floor_is_never_below_the_build(tmp_path: Path) -> None:
    assert Accepted(issued_at=BUILT_AT - timedelta(days=900)).time_floor == BUILT_AT


# ---- tuf-client: the conformance suite does the rest -----------------------------------------------------------------


def parsed(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tuf_client.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_init_keeps_the_root_that_is_trusted(side: CatalogueSide, tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(side.anchor)
    assert tuf_client.run(parsed("--metadata-dir", tmp_path / "m", "init", tmp_path / "root")) == 0
    assert (tmp_path / "m" / "root.json").read_bytes() == side.anchor


def test_refresh_wants_init_first_and_a_url(side: CatalogueSide, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="run init"):
        tuf_client.run(parsed("--metadata-dir", tmp_path, "refresh"))
    (tmp_path / "root").write_bytes(side.anchor)
    tuf_client.run(parsed("--metadata-dir", tmp_path, "init", tmp_path / "root"))
    with pytest.raises(InvalidRequest, match="--metadata-url"):
        tuf_client.run(parsed("--metadata-dir", tmp_path, "refresh"))
