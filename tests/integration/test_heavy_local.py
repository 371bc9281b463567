"""The embedded heavy tier for real: a child process with Ray, replicas that fetch models, and what kills them.

One child serves the whole file (10 s to start); this process never imports ray.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from controller.demo.ports import free_port
from controller.heavy.client import HeavyClient
from controller.heavy.local import LocalHeavy
from controller.settings import HeavySettings
from core.clock import SystemClock
from core.deadline import Deadline
from core.digest import Digest, digest_of
from core.errors import (
    DeadlineExceeded,
    HeavyUnavailable,
    IntegrityError,
    InvalidRequest,
    ModelNotReady,
    UnknownModel,
)
from core.open_inference.messages import InferRequest, InferResponse
from core.spiffe import Role
from core.tls_files import write_tls_identity
from tests.support.certified import FleetAuthority
from tests.support.heavy_load import ask_under_load
from tests.support.heavy_tier import (
    MemoryBlobs,
    SpanCollector,
    controller_side,
    publish,
    scaling_onnx,
    scaling_request,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Generous: the machine may be busy with other tests.
START_TIMEOUT_S = 90.0
END_TIMEOUT_S = 60.0


@dataclass
class Tier:
    blobs: MemoryBlobs
    collector: SpanCollector
    client: HeavyClient

    async def ask(
        self, request: InferRequest, digest: Digest, *, timeout_s: float = 20.0, traceparent: str | None = None
    ) -> InferResponse:
        deadline = Deadline.after(timeout_s, now_s=SystemClock().monotonic_s())
        return await self.client.infer(request, digest=digest, deadline=deadline, traceparent=traceparent)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tier(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Tier]:
    data_dir, blobs, collector, clock = tmp_path_factory.mktemp("heavy"), MemoryBlobs(), SpanCollector(), SystemClock()
    settings = HeavySettings(port=free_port(), max_replicas=1)
    url, tls_dir = f"http://127.0.0.1:{settings.port}", data_dir / "tls"
    async with (
        controller_side(blobs, collector, tls_dir=tls_dir) as controller,
        HeavyClient(url, clock=clock) as client,
    ):
        local = LocalHeavy(
            settings, data_dir=data_dir, controller=controller, tls_dir=tls_dir, readiness=client, clock=clock
        )
        tasks = [asyncio.create_task(client.run()), asyncio.create_task(local.run())]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await client.wait_answer()
            session = heavy_child(os.getpid()).pid
            yield Tier(blobs, collector, client)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    assert processes_of(session) == []


def heavy_child(parent: int) -> psutil.Process:
    (child,) = (
        process for process in psutil.Process(parent).children() if "controller.heavy.embedded" in process.cmdline()
    )
    return child


def processes_of(session: int) -> list[psutil.Process]:
    """Return what lives of a session; all of Ray's processes stay in the session of the child that started Ray."""

    def is_alive_in_session(process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    return [process for process in psutil.process_iter() if is_alive_in_session(process)]


def replica_of(session: int) -> psutil.Process:
    (replica,) = (process for process in processes_of(session) if "ServeReplica" in " ".join(process.cmdline()))
    return replica


async def test_a_model_answers_by_its_digest(tier: Tier) -> None:
    digest = publish(tier.blobs, scaling_onnx(3.0))
    response = await tier.ask(scaling_request(2.0), digest)
    assert response.model_name == "scaling"
    assert response.model_version == "1"
    np.testing.assert_array_equal(response.outputs[0].array, np.full((1, 4), 6.0, np.float32))


async def test_requests_of_several_models_in_flight_are_answered_by_their_own_model(tier: Tier) -> None:
    digests = {
        factor: publish(tier.blobs, scaling_onnx(factor), name=f"by-{int(factor)}", max_batch=8)
        for factor in (2.0, 5.0, 7.0)
    }

    async def ask(factor: float, value: float) -> float:
        request = scaling_request(value, name=f"by-{int(factor)}", rows=1 + int(value) % 3)
        response = await tier.ask(request, digests[factor])
        assert response.outputs[0].array.shape == request.inputs[0].array.shape
        assert len(np.unique(response.outputs[0].array)) == 1
        return float(response.outputs[0].array[0, 0])

    pairs = [(factor, float(value)) for value in range(20) for factor in digests]
    answers = await asyncio.gather(*(ask(factor, value) for factor, value in pairs))
    assert answers == [factor * value for factor, value in pairs]


async def test_an_unknown_digest_is_an_unknown_model(tier: Tier) -> None:
    with pytest.raises(UnknownModel, match="no model has the digest"):
        await tier.ask(scaling_request(1.0), digest_of(b"never published"))


async def test_bytes_that_are_not_what_the_digest_says_are_refused(tier: Tier) -> None:
    onnx = scaling_onnx(11.0)
    digest = publish(tier.blobs, onnx)
    tier.blobs.contents[digest_of(onnx)] = onnx[:-1] + b"?"
    with pytest.raises(IntegrityError, match="expected sha256"):
        await tier.ask(scaling_request(1.0), digest)


async def test_a_model_that_does_not_load_is_not_ready(tier: Tier) -> None:
    digest = publish(tier.blobs, b"this is not ONNX")
    with pytest.raises(ModelNotReady, match="ONNX Runtime cannot load it"):
        await tier.ask(scaling_request(1.0), digest)


async def test_a_request_that_does_not_fit_the_model_is_refused(tier: Tier) -> None:
    digest = publish(tier.blobs, scaling_onnx(3.0))
    request = scaling_request(1.0)
    narrow = InferRequest("scaling", (type(request.inputs[0])("x", request.inputs[0].datatype, np.ones((1, 3), "f4")),))
    with pytest.raises(InvalidRequest, match=r"expected shape \[-1, 4\], got \[1, 3\]"):
        await tier.ask(narrow, digest)


async def test_a_name_that_is_not_the_digests_own_is_an_unknown_model(tier: Tier) -> None:
    digest = publish(tier.blobs, scaling_onnx(3.0))
    with pytest.raises(UnknownModel, match="is version 1 of 'scaling'"):
        await tier.ask(scaling_request(1.0, name="other"), digest)


async def test_a_replicas_spans_stand_under_the_callers(tier: Tier) -> None:
    digest = publish(tier.blobs, scaling_onnx(3.0))
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    await tier.ask(scaling_request(1.0), digest, traceparent=f"00-{trace_id}-{parent_id}-01")
    spans = await tier.collector.wait_for({"infer scaling", "compute"}, trace_id, timeout_s=20)
    assert spans["infer scaling"].parent_span_id.hex() == parent_id
    assert spans["compute"].parent_span_id == spans["infer scaling"].span_id
    assert {service for service, _ in tier.collector.spans} == {"nanofleet-heavy"}


async def test_a_request_that_is_not_sampled_leaves_no_span(tier: Tier) -> None:
    digest = publish(tier.blobs, scaling_onnx(3.0))
    quiet, loud = "1af7651916cd43dd8448eb211c80319c", "2af7651916cd43dd8448eb211c80319c"
    await tier.ask(scaling_request(1.0), digest, traceparent=f"00-{quiet}-b7ad6b7169203331-00")
    await tier.ask(scaling_request(1.0), digest, traceparent=f"00-{loud}-b7ad6b7169203331-01")
    await tier.collector.wait_for({"infer scaling"}, loud, timeout_s=20)
    assert tier.collector.of_trace(quiet) == {}


async def test_a_killed_replica_costs_no_request_more_than_its_deadline(tier: Tier) -> None:
    digest = publish(tier.blobs, scaling_onnx(3.0))
    session = heavy_child(os.getpid()).pid
    victim = replica_of(session)
    report = await ask_under_load(
        lambda deadline: tier.client.infer(scaling_request(2.0), digest=digest, deadline=deadline, traceparent=None),
        then=lambda: os.kill(victim.pid, signal.SIGKILL),
    )
    assert report.longest_over_deadline_s < 0.5
    assert set(report.refusals) <= {HeavyUnavailable, DeadlineExceeded}
    assert report.answered_after > 0


async def test_everything_ends_when_the_parent_is_killed(tmp_path: Path) -> None:
    tls_dir = tmp_path / "tls"
    write_tls_identity(tls_dir, FleetAuthority().identity(Role.HEAVY))
    words = [str(tmp_path), str(tls_dir), str(free_port())]
    parent = subprocess.Popen([sys.executable, "-m", "tests.support.heavy_parent", *words], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        assert await asyncio.wait_for(asyncio.to_thread(parent.stdout.readline), START_TIMEOUT_S)
        session = heavy_child(parent.pid).pid
        started = processes_of(session)
        parent.kill()
    assert len(started) > 5
    _, alive = await asyncio.to_thread(psutil.wait_procs, started, END_TIMEOUT_S)
    assert alive == []
