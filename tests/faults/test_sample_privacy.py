"""A marker in the data of each privacy class: where it is found after requests, a pull and a local export."""

import asyncio
import io
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from random import randrange

import numpy as np
import pytest

from core.errors import NanofleetError
from core.ids import ModelName
from core.samples import SampleOrder
from edge_agent.samples.collector import Collector, Permissions
from edge_agent.samples.command import export_samples
from edge_agent.samples.rules import Rules, Selection
from edge_agent.samples.store import SampleStore, StoreBounds
from edge_agent.samples.uploader import SampleUploader, UploadTerms
from tests.support.clocks import HeldClock
from tests.support.edge_plane import FakeHeavy, cascade_of, echo_model, plane_with, request_of
from tests.unit.agent.test_sample_uploader import PULL, FakeCalls, order

# Scores of an answer that is not sure; their fractions are found nowhere else.
MARKERS = {"device": 0.34375, "site": 0.40625, "any": 0.46875}


@pytest.fixture
def disk() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def markers_in(*contents: bytes) -> set[str]:
    """Return the classes whose marker is in an array of these samples."""
    found: set[str] = set()
    for content in contents:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            numbers = {float(n) for key in arrays.files if key != "sample.json" for n in arrays[key].flat}
        found |= {word for word, marker in MARKERS.items() if marker in numbers}
    return found


async def kept_by(folder: Path, disk: Executor, *, keeps_site: bool) -> SampleStore:
    """Return the store of an agent that was asked once for each class, with the marker in inputs and outputs."""
    store = SampleStore(folder, StoreBounds(reserve_bytes=0))
    collector = Collector(
        store,
        Selection(Rules(), below=randrange),
        Permissions(lambda _: True, keeps_site),
        disk=disk,
        clock=HeldClock(),
    )
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy, examples=collector)
    task = asyncio.create_task(collector.run())
    for word, marker in MARKERS.items():
        try:
            await plane.ask(request_of((0.0, 0.5, marker), privacy=word))
        except NanofleetError:
            raise AssertionError(f"class {word} was not answered") from None
    async with asyncio.timeout(10):
        while collector.stored < 1 + keeps_site:
            await asyncio.sleep(0)
    await collector.look()
    task.cancel()
    await asyncio.wait([task])
    assert len(heavy.asked) == 1
    return store


@pytest.mark.parametrize(("keeps_site", "kept"), [(False, {"any"}), (True, {"any", "site"})])
async def test_on_this_disk_there_is_nothing_of_class_device_and_of_class_site_only_what_the_settings_allow(
    tmp_path: Path, disk: Executor, keeps_site: bool, kept: set[str]
) -> None:
    await kept_by(tmp_path / "samples", disk, keeps_site=keeps_site)
    assert markers_in(*(path.read_bytes() for path in (tmp_path / "samples").iterdir())) == kept


async def test_to_the_controller_goes_class_any_alone(tmp_path: Path, disk: Executor) -> None:
    store = await kept_by(tmp_path / "samples", disk, keeps_site=True)
    calls = FakeCalls()
    uploader = SampleUploader(calls, store, UploadTerms(lambda _: True), disk=disk, clock=HeldClock())
    task = asyncio.create_task(uploader.run())
    wanted: SampleOrder = order()
    assert (wanted.pull_id, wanted.model) == (PULL, ModelName("digits"))
    uploader.order(wanted)
    async with asyncio.timeout(10):
        while not uploader.uploaded or uploader._orders:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert markers_in(*calls.spooled.values()) == {"any"}


async def test_whoever_is_at_the_machine_exports_class_site_too(tmp_path: Path, disk: Executor) -> None:
    await kept_by(tmp_path / "samples", disk, keeps_site=True)
    assert export_samples(tmp_path / "samples", tmp_path / "out", agent="gate-1", model=None) == 0
    exported = [path.read_bytes() for path in (tmp_path / "out").glob("*.npz")]
    assert markers_in(*exported) == {"any", "site"}
