"""Collector: from an offer in the loop to a file on the disk, and what becomes of what cannot be kept."""

import asyncio
import errno
import io
import json
import math
import shutil
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from random import Random

import numpy as np
import pytest

from core.errors import DiskFull
from core.sample_file import SampleTensors, SampleView, encode_sample, read_description
from core.tensors import Datatype, Tensor
from edge_agent.cascade.policy import Privacy, Reason
from edge_agent.samples.collector import MAX_QUEUED, Collector, Permissions
from edge_agent.samples.made import label_of
from edge_agent.samples.rules import Rules, Selection
from edge_agent.samples.store import KeptSample, SampleStore, StoreBounds
from tests.support.clocks import HeldClock
from tests.support.edge_plane import UNSURE, cascade_of, echo_model, plane_with, request_of
from tests.support.hard_examples import hard_example, made_file, scores

FLAWED = (math.nan, 0.5, 0.4)


class FailingStore(SampleStore):
    """A disk that takes nothing for as long as `error` is set."""

    error: Exception | None = None

    def put(self, view: SampleView, content: bytes, *, now: datetime) -> KeptSample:
        if self.error is not None:
            raise self.error
        return super().put(view, content, now=now)


@pytest.fixture
def disk() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def store(tmp_path: Path) -> FailingStore:
    return FailingStore(tmp_path / "samples", StoreBounds(reserve_bytes=0))


def collector(
    store: SampleStore,
    disk: Executor,
    *,
    rules: Rules = Rules(),  # noqa: B008 (frozen)
    keeps_site: bool = False,
    only: str | None = None,
) -> Collector:
    permissions = Permissions(lambda model: only in (None, model), keeps_site)
    chance = Random(1).randrange
    return Collector(store, Selection(rules, below=chance), permissions, disk=disk, clock=HeldClock())


@asynccontextmanager
async def running(subject: Collector) -> AsyncIterator[None]:
    task = asyncio.create_task(subject.run())
    try:
        async with asyncio.timeout(10):
            yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0)


def read(store: SampleStore) -> dict[str, object]:
    """Return the only sample as numpy alone reads it."""
    [kept] = store.all()
    with np.load(io.BytesIO(store.read(kept)), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


async def test_an_escalated_request_is_kept_with_its_inputs_both_answers_and_the_label(
    store: FailingStore, disk: Executor
) -> None:
    subject = collector(store, disk)
    async with running(subject):
        subject.offer(hard_example(UNSURE, heavy=(0.0, 1.0, 7.0)))
        await until(lambda: subject.counts.rows)
    found = read(store)
    described = json.loads(found["sample.json"])  # type: ignore[arg-type]
    assert np.array_equal(found["input/x"], scores(UNSURE).array)  # type: ignore[arg-type]
    assert np.array_equal(found["edge/scores"], scores(UNSURE).array)  # type: ignore[arg-type]
    assert np.array_equal(found["heavy/scores"], scores((0.0, 1.0, 7.0)).array)  # type: ignore[arg-type]
    assert (described["label"], described["heavy_label"], described["heavy_model"]) == (1, 2, "large")
    assert (described["model"], described["version"], described["variant"]) == ("digits", "3", "int8-static")
    assert (described["reason"], described["tier"], described["privacy"]) == ("low_confidence", "heavy", "any")
    assert described["manifest"] == echo_model(cascade=cascade_of()).digest
    assert subject.counts.rows[0].samples == 1


async def test_a_flawed_answer_is_kept_by_its_flaw_and_without_a_label(store: FailingStore, disk: Executor) -> None:
    subject = collector(store, disk)
    async with running(subject):
        subject.offer(hard_example(FLAWED, reason=Reason.HEAVY_UNAVAILABLE))
        await until(lambda: subject.stored)
    [kept] = store.all()
    view = read_description(store.read(kept))
    assert (view.reason, view.flaw, view.label, view.confidence) == ("not_finite", "not_finite", None, None)


async def test_data_of_class_device_is_never_kept(store: FailingStore, disk: Executor) -> None:
    subject = collector(store, disk, keeps_site=True)
    async with running(subject):
        subject.offer(hard_example(privacy=Privacy.DEVICE))
        subject.offer(hard_example(privacy=Privacy.ANY))
        await until(lambda: subject.stored)
    assert [kept.privacy for kept in store.all()] == ["any"]


@pytest.mark.parametrize("keeps_site", [True, False])
async def test_data_of_class_site_is_kept_only_where_the_settings_say_so(
    store: FailingStore, disk: Executor, keeps_site: bool
) -> None:
    subject = collector(store, disk, keeps_site=keeps_site)
    async with running(subject):
        subject.offer(hard_example(privacy=Privacy.SITE, reason=Reason.PRIVACY))
        subject.offer(hard_example())
        await until(lambda: subject.stored == 1 + keeps_site)
    assert sorted(kept.privacy for kept in store.all()) == ["any", "site"][: 1 + keeps_site]
    assert subject.dropped["site"] == (not keeps_site)


async def test_a_model_that_was_not_chosen_is_passed_over(store: FailingStore, disk: Executor) -> None:
    subject = collector(store, disk, only="faces")
    async with running(subject):
        subject.offer(hard_example())
        subject.offer(hard_example(model="faces"))
        await until(lambda: subject.stored)
    assert [kept.model for kept in store.all()] == ["faces"]


async def test_what_the_rules_replace_leaves_the_disk(store: FailingStore, disk: Executor) -> None:
    subject = Collector(
        store,
        Selection(Rules(1.0, 0.0, 1, 10), below=lambda _: 0),
        Permissions(lambda _: True),
        disk=disk,
        clock=HeldClock(),
    )
    async with running(subject):
        subject.offer(hard_example((0.0, 0.5, 0.4)))
        subject.offer(hard_example((0.0, 0.6, 0.4)))
        await until(lambda: subject.stored == 2)
        await subject.look()
    assert read(store)["input/x"][0, 1] == np.float32(0.6)  # type: ignore[index]
    assert subject.counts.rows[0].samples == 1


async def test_a_burst_beyond_the_queue_is_counted_and_costs_no_memory(store: FailingStore, disk: Executor) -> None:
    subject = collector(store, disk, rules=Rules(1.0, 0.0, 1000, 1000))
    for _ in range(MAX_QUEUED + 5):
        subject.offer(hard_example())
    assert subject.dropped["queue"] == 5


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "full"), "disk_full"),
        (OSError(errno.EROFS, "read-only"), "disk"),
        (DiskFull("full"), "disk_full"),
    ],
)
async def test_a_disk_that_takes_nothing_is_counted_warned_of_once_and_tried_again(
    store: FailingStore, disk: Executor, caplog: pytest.LogCaptureFixture, error: Exception, reason: str
) -> None:
    subject = collector(store, disk)
    store.error = error
    async with running(subject):
        subject.offer(hard_example())
        subject.offer(hard_example())
        await until(lambda: subject.dropped[reason] == 2)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        store.error = None
        subject.offer(hard_example())
        await until(lambda: subject.stored)


async def test_requests_are_answered_while_no_sample_can_be_kept(store: FailingStore, disk: Executor) -> None:
    subject = collector(store, disk)
    store.error = OSError(errno.ENOSPC, "full")
    plane = await plane_with(echo_model(cascade=cascade_of()), examples=subject)
    async with running(subject):
        for _ in range(3):
            assert (await plane.ask(request_of(UNSURE))).tier.value == "heavy"
        await until(lambda: subject.dropped["disk_full"] == 3)


async def test_a_folder_that_cannot_be_made_is_counted(tmp_path: Path, disk: Executor) -> None:
    (tmp_path / "samples").write_text("in the way")
    subject = collector(SampleStore(tmp_path / "samples", StoreBounds(reserve_bytes=0)), disk)
    async with running(subject):
        subject.offer(hard_example())
        await until(lambda: subject.dropped["disk"])


async def test_a_purge_shows_at_the_next_look(store: FailingStore, disk: Executor) -> None:
    subject = collector(store, disk)
    async with running(subject):
        subject.offer(hard_example())
        await until(lambda: subject.stored)
        await until(lambda: subject.counts.rows)
    shutil.rmtree(next(Path(store._folder).parent.glob("samples")))
    await subject.look()
    assert not subject.counts.rows


@pytest.mark.parametrize(
    ("rows", "label"),
    [
        ([[0.1, 0.9], [0.5, 0.4]], 0),
        ([[3.0, 1.0, 2.0]], 0),
        ([[math.nan, 1.0]], None),
        ([[1.0]], None),
        ([], None),
    ],
)
def test_the_label_is_the_class_of_the_row_that_is_least_sure(rows: list[list[float]], label: int | None) -> None:
    assert label_of(np.array(rows, np.float32)) == label


def test_texts_bfloats_and_odd_names_are_stored_without_pickle() -> None:
    view, _ = made_file()
    words = np.empty((2,), object)
    words[:] = [b"sure", b"\x00\xff"]
    inputs = (
        Tensor("text", Datatype.BYTES, words),
        Tensor("half", Datatype.BF16, np.array([0x3F80], "<u2")),
        Tensor("../x\x00y", Datatype.FP32, np.zeros((), np.float32)),
    )
    content = encode_sample(view, SampleTensors(inputs, ()))
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert arrays["input/text"].tobytes() == b"\x04\0\0\0sure\x02\0\0\0\x00\xff"
        assert arrays["input/half"].dtype == np.uint16
        assert arrays["input/2"].shape == ()
    assert [each.shape for each in read_description(content).tensors] == [(2,), (1,), ()]
    assert read_description(content).tensors[2].name == "../x\x00y"


async def test_a_sample_does_not_say_which_request_it_was(store: FailingStore, disk: Executor) -> None:
    subject = collector(store, disk)
    example = hard_example(request_id="client-4711-request-1")
    assert example.request.id == "client-4711-request-1"
    async with running(subject):
        subject.offer(example)
        await until(lambda: subject.stored)
    [kept] = store.all()
    assert b"4711" not in store.read(kept)
