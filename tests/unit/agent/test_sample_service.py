"""Samples: what the settings make of it, and what the status file and Prometheus are told."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from core.clock import SystemClock
from core.exposition import exposed
from core.metrics import Registry
from edge_agent.samples.service import Samples
from edge_agent.samples.store import SampleStore, StoreBounds
from edge_agent.settings import AgentSettings
from tests.support.edge_plane import SURE, UNSURE, cascade_of, echo_model, plane_with, request_of
from tests.support.hard_examples import made_file


def samples(folder: Path, **settings: Any) -> Samples:
    read = AgentSettings.model_validate({"samples": {"reserve_bytes": 0}, **settings})
    return Samples(read, folder, grpc.aio.insecure_channel("127.0.0.1:9"), clock=SystemClock())


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, []),
        ({"models": {"digits": {"samples": True}}}, ["digits"]),
        ({"samples": {"enabled": True, "reserve_bytes": 0}}, ["digits", "faces"]),
        (
            {"samples": {"enabled": True, "reserve_bytes": 0}, "models": {"faces": {"samples": False}}},
            ["digits"],
        ),
    ],
)
async def test_nothing_is_kept_unless_it_was_chosen_for_all_models_or_one(
    tmp_path: Path, settings: dict[str, Any], kept: list[str]
) -> None:
    subject = samples(tmp_path / "samples", **settings)
    plane = await plane_with(
        echo_model("digits", cascade=cascade_of()),
        echo_model("faces", cascade=cascade_of()),
        examples=subject.collector,
    )
    tasks = [asyncio.ensure_future(loop()) for loop in subject.loops.values()]
    for model in ("digits", "faces"):
        await plane.ask(request_of(UNSURE, model=model))
        await plane.ask(request_of(SURE, model=model))
    async with asyncio.timeout(10):
        while len(subject.counts().rows) < len(kept):
            await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    subject.close()
    assert sorted(row.model for row in subject.counts().rows) == kept
    assert all(row.samples == 1 for row in subject.counts().rows)
    # Not even a folder.
    assert (tmp_path / "samples").exists() is bool(kept)


async def test_status_and_metrics_say_what_became_of_hard_examples(tmp_path: Path) -> None:
    subject = samples(tmp_path, models={"digits": {"samples": True}})
    assert subject.collector is not None
    subject.collector.stored = 3
    subject.collector.dropped.update(disk_full=2)
    assert subject.counters() == {"samples_stored": 3, "samples_dropped_disk_full": 2, "samples_uploaded": 0}
    registry = Registry()
    subject.register(registry)
    text = (await exposed(registry, accept=""))[0].decode()
    assert 'nanofleet_samples_total{outcome="stored"} 3' in text
    assert 'nanofleet_samples_total{outcome="disk_full"} 2' in text
    assert "nanofleet_samples_kept_bytes 0" in text
    subject.close()


async def test_an_agent_that_keeps_none_shows_nothing_of_them(tmp_path: Path) -> None:
    subject = samples(tmp_path)
    registry = Registry()
    subject.register(registry)
    assert subject.counters() == {}
    assert b"samples" not in (await exposed(registry, accept=""))[0]
    subject.close()


async def test_what_was_kept_before_it_was_switched_off_still_grows_old(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, StoreBounds(reserve_bytes=0))
    store.put(*made_file(taken_at=datetime(2020, 1, 1, tzinfo=UTC)), now=datetime(2020, 1, 1, tzinfo=UTC))
    subject = samples(tmp_path)
    assert subject.collector is None
    tidying = asyncio.ensure_future(subject.loops["samples-tidy"]())
    async with asyncio.timeout(10):
        while list(tmp_path.iterdir()):
            await asyncio.sleep(0)
    tidying.cancel()
    await asyncio.wait([tidying])
    subject.close()
