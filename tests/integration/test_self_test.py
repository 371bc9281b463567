"""Self-test in a real child process, on real ONNX models: what passes, what fails and why, and that it always ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.digest import digest_of_file
from core.errors import Unavailable
from core.manifest import File, Manifest, SelfTest
from core.tensors import Array
from edge_agent.activation.self_test import MAX_TIMEOUTS, SelfTester, SelfTestLimits, SelfTestResult
from tests.support.edge_models import BuiltModel, make_echo, make_mlp, mlp_scores

INPUTS = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)


def with_golden(model: BuiltModel, inputs: Array, outputs: Array, **bounds: float) -> Manifest:
    """Return the model's manifest with a self-test; its file is put beside the others."""
    path = model.folder / "golden.npz"
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, **{"input.x": inputs, "output.scores": outputs})
    golden = File(path=path.name, digest=digest_of_file(path), size_bytes=path.stat().st_size)
    found = model.manifest.model_dump()
    found["files"] = [*model.manifest.files, golden]
    found["self_test"] = SelfTest.model_validate({"file": path.name, "rtol": 1e-3, "atol": 1e-4, **bounds})
    return Manifest.model_validate(found)


async def outcome(manifest: Manifest, folder: Path, limits: SelfTestLimits | None = None) -> SelfTestResult:
    return await SelfTester(limits or SelfTestLimits()).test(manifest, folder)


def why(result: SelfTestResult) -> str:
    assert result.problem is not None
    return result.problem.message


async def test_a_variant_that_answers_as_published_passes(tmp_path: Path) -> None:
    manifest = with_golden(make_mlp(tmp_path), INPUTS, mlp_scores(INPUTS), max_latency_p95_ms=500.0)
    result = await outcome(manifest, tmp_path)
    assert result.problem is None
    assert result.latency_p95_ms is not None
    assert 0 < result.latency_p95_ms < 500
    assert result.peak_rss_bytes is not None
    assert result.peak_rss_bytes > 1 << 20


async def test_a_variant_that_does_not_batch_is_asked_one_sample_after_another(tmp_path: Path) -> None:
    model = make_mlp(tmp_path, max_batch=1)
    manifest = with_golden(model, INPUTS[:, None, :], mlp_scores(INPUTS)[:, None, :])
    assert (await outcome(manifest, tmp_path)).problem is None


async def test_a_variant_without_golden_inputs_is_loaded_and_run_once(tmp_path: Path) -> None:
    assert (await outcome(make_mlp(tmp_path).manifest, tmp_path)).problem is None


def shifted(outputs: Array) -> Array:
    return outputs + np.float32(0.01)


def wider(outputs: Array) -> Array:
    return outputs[:, :-1]


@pytest.mark.parametrize(("wrong", "reason"), [(shifted, "a difference of 0.01"), (wider, "expected shape [4, 9]")])
async def test_other_answers_than_published_fail(tmp_path: Path, wrong: Callable[[Array], Array], reason: str) -> None:
    manifest = with_golden(make_mlp(tmp_path), INPUTS, wrong(mlp_scores(INPUTS)))
    assert reason in why(await outcome(manifest, tmp_path))


async def test_nan_where_the_publisher_had_a_number_fails(tmp_path: Path) -> None:
    inputs = np.full((1, 4), np.nan, np.float32)
    manifest = with_golden(make_echo(tmp_path), inputs, np.zeros((1, 4), np.float32))
    assert "expected finite numbers" in why(await outcome(manifest, tmp_path))


async def test_nan_where_the_publisher_had_it_too_passes(tmp_path: Path) -> None:
    inputs = np.full((1, 4), np.nan, np.float32)
    assert (await outcome(with_golden(make_echo(tmp_path), inputs, inputs), tmp_path)).problem is None


@pytest.mark.parametrize(
    ("bound", "reason"),
    [({"max_latency_p95_ms": 1e-6}, "95 of 100 runs within"), ({"max_rss_bytes": 1}, "a peak of at most 1 bytes")],
)
async def test_a_bound_of_the_manifest_that_does_not_hold_fails(
    tmp_path: Path, bound: dict[str, float], reason: str
) -> None:
    manifest = with_golden(make_mlp(tmp_path), INPUTS, mlp_scores(INPUTS), **bound)
    assert reason in why(await outcome(manifest, tmp_path))


async def test_a_file_that_is_no_model_fails(tmp_path: Path) -> None:
    model = make_mlp(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"GIF89a")
    assert "does not load it" in why(await outcome(model.manifest, tmp_path))


async def test_golden_inputs_with_pickles_are_never_opened(tmp_path: Path) -> None:
    trap = np.array([Path(tmp_path)], dtype=object)
    manifest = with_golden(make_mlp(tmp_path), trap, trap)
    assert "allow_pickle=False" in why(await outcome(manifest, tmp_path))


async def test_a_variant_that_wants_more_memory_than_allowed_fails(tmp_path: Path) -> None:
    manifest = make_mlp(tmp_path).manifest
    assert "failed its self-test" in why(await outcome(manifest, tmp_path, SelfTestLimits(memory_bytes=16 << 20)))


async def test_d13_two_timeouts_are_laid_to_the_machine_and_the_third_to_the_variant(tmp_path: Path) -> None:
    manifest = make_mlp(tmp_path).manifest
    tester = SelfTester(SelfTestLimits(timeout_s=0.02))
    for _ in range(MAX_TIMEOUTS - 1):
        with pytest.raises(Unavailable, match=r"not done within 0\.02 s; it is tried again"):
            await tester.test(manifest, tmp_path)
    assert "not done within 0.02 s, 3 times" in why(await tester.test(manifest, tmp_path))


async def test_d13_a_process_that_the_machine_killed_is_no_verdict_on_the_variant(tmp_path: Path) -> None:
    before = children()
    testing = asyncio.create_task(outcome(make_mlp(tmp_path).manifest, tmp_path))
    async with asyncio.timeout(10):
        while not (started := children() - before):
            await asyncio.sleep(0)
    os.kill(int(started.pop()), signal.SIGKILL)
    with pytest.raises(Unavailable, match="killed, as for want of memory"):
        await testing


def test_the_bound_on_processor_time_shows_as_such() -> None:
    script = "from edge_agent.activation import child\nchild._limit(memory_bytes=1 << 30, cpu_s=1)\nwhile True: pass"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGXCPU


async def test_cancelling_leaves_no_process_behind(tmp_path: Path) -> None:
    manifest = make_mlp(tmp_path).manifest
    before = children()
    task = asyncio.create_task(outcome(manifest, tmp_path))
    async with asyncio.timeout(10):
        while children() == before:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert children() == before


def children() -> set[str]:
    me = os.getpid()
    return set(Path(f"/proc/{me}/task/{me}/children").read_text().split())
