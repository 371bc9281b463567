"""What variants were measured to take, remembered on disk."""

import logging
from pathlib import Path

import pytest

from core.digest import digest_of
from core.errors import InvalidRequest
from edge_agent.runtime.footprint import MAX_REMEMBERED, Footprint, Footprints, estimated
from tests.support.edge_plane import echo_manifest

SMALL = Footprint(1000, 2000, 0.25)
DIGEST = digest_of(b"a variant")


async def test_what_was_measured_is_known_after_a_restart(tmp_path: Path) -> None:
    await Footprints(tmp_path / "f.json", conditions="x").remember(DIGEST, SMALL)
    assert Footprints(tmp_path / "f.json", conditions="x").get(DIGEST) == SMALL


async def test_under_other_conditions_it_is_measured_again(tmp_path: Path) -> None:
    await Footprints(tmp_path / "f.json", conditions="batches of 8").remember(DIGEST, SMALL)
    assert Footprints(tmp_path / "f.json", conditions="batches of 32").get(DIGEST) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b'{"conditions": "x"}',
        b'{"conditions": "x", "footprints": {"sha256:0": 7}}',
        b'{"conditions": "x", "footprints": {"d": {"resident_bytes": -1, "peak_bytes": 0, "load_s": 0}}}',
        b'{"conditions": "x", "footprints": {"d": {"resident_bytes": 1, "peak_bytes": 1, "load_s": "soon"}}}',
    ],
)
async def test_a_damaged_file_is_forgotten_and_written_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(content)
    figures = Footprints(path, conditions="x")
    assert figures.get(DIGEST) is None
    await figures.remember(DIGEST, SMALL)
    assert Footprints(path, conditions="x").get(DIGEST) == SMALL


async def test_a_disk_that_cannot_be_written_is_said_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"where a folder should be")
    figures = Footprints(tmp_path / "file" / "f.json")
    with caplog.at_level(logging.WARNING):
        await figures.remember(DIGEST, SMALL)
    assert figures.get(DIGEST) == SMALL
    assert "measured sizes are not kept" in caplog.text


async def test_the_oldest_figures_go_first(tmp_path: Path) -> None:
    figures = Footprints()
    await figures.remember(DIGEST, SMALL)
    for number in range(MAX_REMEMBERED):
        await figures.remember(digest_of(b"%d" % number), SMALL)
    assert figures.get(DIGEST) is None
    assert figures.get(digest_of(b"0")) == SMALL


def test_a_peak_is_never_below_what_stays() -> None:
    assert Footprint.parse({"resident_bytes": 9, "peak_bytes": 3, "load_s": 1}).peak_bytes == 9


@pytest.mark.parametrize("figure", [None, {}, {"resident_bytes": 1, "peak_bytes": 2, "load_s": float("inf")}])
def test_what_is_no_footprint_is_refused(figure: object) -> None:
    with pytest.raises(InvalidRequest):
        Footprint.parse(figure)


def test_what_could_not_be_measured_is_taken_for_large() -> None:
    manifest = echo_manifest()
    assert estimated(manifest).peak_bytes == 4 * manifest.size_bytes
