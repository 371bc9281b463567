"""The application on two Ray nodes, one of which dies under load. Ray runs in a process of its own, see `two_nodes`."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.demo.ports import free_port
from controller.heavy.client import HeavyClient
from core.clock import SystemClock
from core.errors import DeadlineExceeded, HeavyUnavailable
from tests.support.heavy_load import ask_under_load
from tests.support.heavy_tier import (
    MemoryBlobs,
    SpanCollector,
    controller_side,
    publish,
    scaling_onnx,
    scaling_request,
)

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0


@contextmanager
def two_nodes(state_dir: Path, tls_dir: Path, port: int, controller: str) -> Iterator["subprocess.Popen[str]"]:
    with (state_dir / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.two_nodes", str(state_dir), str(tls_dir), str(port), controller],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.communicate(timeout=END_TIMEOUT_S)


def read_until(process: "subprocess.Popen[str]", word: str) -> str:
    """Return the next line that begins with `word`; Ray prints lines of its own in between."""
    assert process.stdout is not None
    return next((line.strip() for line in process.stdout if line.startswith(word)), "the process has ended")


def kill_second_node(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("kill\n")
    process.stdin.flush()
    assert read_until(process, "killed") == "killed"


async def test_a_node_that_dies_under_load_costs_no_request_more_than_its_deadline(tmp_path: Path) -> None:
    blobs, port, tls_dir = MemoryBlobs(), free_port(), tmp_path / "tls"
    digest = publish(blobs, scaling_onnx(3.0), max_batch=4)
    url = f"http://127.0.0.1:{port}"
    async with (
        controller_side(blobs, SpanCollector(), tls_dir=tls_dir) as controller,
        HeavyClient(url, clock=SystemClock()) as client,
        asyncio.TaskGroup() as group,
    ):
        with two_nodes(tmp_path, tls_dir, port, str(controller)) as nodes:
            ready = await asyncio.wait_for(asyncio.to_thread(read_until, nodes, "ready"), START_TIMEOUT_S)
            assert ready == "ready [1, 1]"
            probe = group.create_task(client.run())
            report = await ask_under_load(
                lambda deadline: client.infer(scaling_request(2.0), digest=digest, deadline=deadline, traceparent=None),
                then=lambda: kill_second_node(nodes),
            )
            probe.cancel()
    print(report)
    assert report.longest_over_deadline_s < 0.5
    assert set(report.refusals) <= {HeavyUnavailable, DeadlineExceeded}
    assert report.answered_after > 0
