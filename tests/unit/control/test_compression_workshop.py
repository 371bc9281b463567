"""The child process: what it inherits, what bounds it, and that it is gone afterwards."""

import asyncio
import os
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import helper

from controller.compression.model import EvaluationTask, ModelBundle
from controller.compression.workshop import ChildWorkshop
from core.errors import InvalidModel
from core.tensors import Array
from tests.support.onnx_models import bundle_of, dense_net, model_of


def workshop(*, timeout_s: float = 60, memory_bytes: int = 1 << 29) -> ChildWorkshop:
    return ChildWorkshop(timeout_s=timeout_s, memory_bytes=memory_bytes, max_file_bytes=1 << 28)


def expanding(folder: Path) -> ModelBundle:
    """A model of a few bytes whose constant has 40 GB."""
    shape: Array = np.array([100_000, 100_000], np.int64)
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["big"]), helper.make_node("Add", ["x", "big"], ["y"])]
    model = model_of(nodes, inputs={"x": [1]}, outputs={"y": [100_000, 100_000]}, weights={"s": shape})
    return bundle_of(folder, model)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "controller.compression.child" in child.cmdline()]


async def started_child() -> psutil.Process:
    """Return the child once it runs its own program; another process's start has no event to wait for."""
    async with asyncio.timeout(10):
        while not (found := children()):
            await asyncio.sleep(0.005)
    return found[0]


# Starts the child, tells its id, and leaves the order's line unfinished: the child reads on until this process is gone.
ORPHAN = """
import subprocess, sys
from pathlib import Path
from controller.children.confinement import Limits
from controller.compression.child import ORDER, EvaluateJob, Order
from controller.compression.model import EvaluationTask, ModelBundle
child = subprocess.Popen([sys.executable, "-I", "-m", "controller.compression.child"], stdin=subprocess.PIPE)
job = EvaluateJob(EvaluationTask(ModelBundle(Path(sys.argv[1]), "model.onnx")))
child.stdin.write(ORDER.dump_json(Order(Limits(1 << 30, 60, 1 << 28), job)))
child.stdin.flush()
print(child.pid, flush=True)
child.wait()
"""


async def test_a_model_that_explodes_is_refused_and_costs_only_its_child(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="model: "):
        await workshop().evaluate(EvaluationTask(expanding(tmp_path)))


async def test_a_child_over_its_time_is_refused_and_gone(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"inspect took longer than 0\.01 s and was stopped"):
        await workshop(timeout_s=0.01).inspect(bundle_of(tmp_path, dense_net()))

    assert children() == []


async def test_a_cancelled_caller_takes_its_child_along(tmp_path: Path) -> None:
    inspecting = asyncio.create_task(workshop().inspect(bundle_of(tmp_path, dense_net())))
    await started_child()

    inspecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await inspecting

    assert children() == []


async def test_a_child_that_is_killed_is_a_refusal_with_its_signal(tmp_path: Path) -> None:
    inspecting = asyncio.create_task(workshop().inspect(bundle_of(tmp_path, dense_net())))
    (await started_child()).kill()

    with pytest.raises(InvalidModel, match="inspect ended its process: killed by SIGKILL"):
        await inspecting


async def test_a_child_whose_parent_is_gone_ends_by_itself(tmp_path: Path) -> None:
    starter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ORPHAN, str(bundle_of(tmp_path, dense_net()).folder)), stdout=asyncio.subprocess.PIPE
    )
    assert starter.stdout is not None
    child = psutil.Process(int(await starter.stdout.readline()))
    starter.kill()
    await starter.wait()

    await asyncio.to_thread(psutil.wait_procs, [child], 30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def test_nothing_beside_the_model_is_imported_and_no_secret_is_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOFLEET_SECRET", "hunter2")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spy = b"import os; open('spied', 'w').write(repr(dict(os.environ)))"

    await workshop().inspect(bundle_of(tmp_path, dense_net(), onnx_py=spy, sitecustomize_py=spy, json_py=spy))

    assert not (tmp_path / "spied").exists()


async def test_the_child_sees_only_a_clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFLEET_SECRET", "hunter2")
    inspecting = asyncio.create_task(workshop().inspect(bundle_of(tmp_path, dense_net())))
    environment: dict[str, str] = {}
    async with asyncio.timeout(10):
        # Until the new program has replaced the fork, which still has ours.
        while "ORT_DISABLE_TELEMETRY" not in environment or "PATH" in environment:
            await asyncio.sleep(0.002)
            environment = next((child.environ() for child in children()), {})
    await inspecting

    assert "NANOFLEET_SECRET" not in environment
    assert environment["TMPDIR"] == str(tmp_path)
    assert os.environ["NANOFLEET_SECRET"] == "hunter2"
