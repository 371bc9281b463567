"""Models in and out of memory for real: ONNX Runtime, measured sizes, damaged files, and the repository over gRPC."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

from core.addresses import Address
from core.clock import SystemClock
from core.errors import ModelNotReady, TooLarge
from core.exposition import written
from core.grpc_transport import TransportCredentials, open_channel
from core.manifest import Manifest
from core.metrics import Registry
from core.open_inference import protobuf_body
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor
from edge_agent.activation.self_test import SelfTester, SelfTestLimits
from edge_agent.agent_metrics import register_residency
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.grpc import GrpcFront
from edge_agent.health.status_file import MemoryView
from edge_agent.runtime.footprint import Footprint, Footprints
from edge_agent.runtime.hosting import Hosting, hosting_by
from edge_agent.runtime.pool import ModelPool
from edge_agent.runtime.residency import ResidencyTerms
from edge_agent.settings import ModelSettings, ResidencySettings, RuntimeSettings
from protos.inference.v2 import open_inference_pb2 as pb
from protos.inference.v2 import open_inference_pb2_grpc as pb_grpc
from tests.support.edge_models import BuiltModel, make_echo, make_mlp
from tests.support.edge_plane import plane_over
from tests.support.exposed import numbers

# What the echo model is taken for: no room for two of them at the moment of a load.
MIB = 1 << 20
TAKES = Footprint(10 * MIB, 15 * MIB, 0.001)
ONE_FITS = ResidencyTerms(20 * MIB, protect_s=0.0, protect_loads=0.0)


class CountedScales:
    """Says of every variant that it takes the same."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    async def measure(self, manifest: Manifest, folder: Path) -> Footprint | None:
        self.measured.append(manifest.model)
        return TAKES


def pool_of(terms: ResidencyTerms = ONE_FITS, **models: ModelSettings) -> ModelPool:
    return ModelPool(
        RuntimeSettings(), clock=SystemClock(), hosting=Hosting(terms, Footprints(), CountedScales(), models)
    )


def asked(name: str, value: float = 1.0) -> InferRequest:
    return InferRequest(name, (Tensor("x", Datatype.FP32, np.full((1, 4), value, np.float32)),))


async def hosting(pool: ModelPool, folder: Path, *names: str) -> list[BuiltModel]:
    models = [make_echo(folder / name, name=name) for name in names]
    for model in models:
        await pool.load(model.manifest, model.digest, model.folder)
    return models


async def answer(plane: EdgeDataPlane, name: str, value: float = 1.0) -> float:
    return float((await plane.answer(asked(name, value))).response.outputs[0].array[0, 0])


def states(pool: ModelPool) -> dict[str, str]:
    return {model.manifest.model: pool.residency(model.manifest.model).phase.value for model in pool.models()}


async def test_models_that_do_not_fit_together_are_all_hosted_and_answer(tmp_path: Path) -> None:
    pool = pool_of()
    plane = plane_over(pool)
    await hosting(pool, tmp_path, "cat", "dog", "eel")
    assert states(pool) == {"cat": "cold", "dog": "cold", "eel": "resident"}
    assert [await answer(plane, name, 7.0) for name in ("cat", "dog", "eel", "cat")] == [7.0] * 4
    assert TAKES.resident_bytes <= pool.taken_bytes <= ONE_FITS.budget_bytes
    await pool.close()


async def test_a_file_that_was_damaged_since_is_found_at_the_next_load_and_the_others_go_on(tmp_path: Path) -> None:
    pool = pool_of()
    plane = plane_over(pool)
    cat, _ = await hosting(pool, tmp_path, "cat", "dog")
    path = cat.folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ModelNotReady, match="the file is damaged") as refusal:
        await plane.answer(asked("cat"))
    assert refusal.value.retry_after_s is not None
    assert await answer(plane, "dog", 3.0) == 3.0
    (entry,) = [entry for entry in await plane.index() if entry.name == "cat"]
    assert (entry.state, "the file is damaged" in entry.reason) == ("UNAVAILABLE", True)
    assert not await plane.is_model_ready("cat", "")
    await pool.close()


async def test_a_model_larger_than_the_budget_is_refused_and_what_runs_goes_on(tmp_path: Path) -> None:
    pool = pool_of(ResidencyTerms(14 * MIB))
    model = make_echo(tmp_path)
    with pytest.raises(TooLarge, match="raise \\[residency\\] budget_bytes"):
        await pool.load(model.manifest, model.digest, model.folder)
    assert pool.running() == {}
    assert pool.taken_bytes == 0
    await pool.close()


async def test_a_pinned_model_stays_in_memory_whoever_is_asked(tmp_path: Path) -> None:
    pool = pool_of(ResidencyTerms(100 * MIB, protect_s=0, protect_loads=0), cat=ModelSettings(pinned=True))
    plane = plane_over(pool)
    names = [f"m{number}" for number in range(12)]
    await hosting(pool, tmp_path, "cat", *names)
    for name in names:
        await answer(plane, name)
    assert states(pool)["cat"] == "resident"
    assert "cold" in states(pool).values()
    await pool.close()


async def test_after_a_start_a_prewarmed_model_stays_before_those_nobody_asked_for(tmp_path: Path) -> None:
    pool = pool_of(ResidencyTerms(40 * MIB), dog=ModelSettings(prewarm=True))
    await hosting(pool, tmp_path, "cat", "dog", "eel", "fox", "gnu")
    assert states(pool)["dog"] == "resident"
    assert states(pool)["cat"] == "cold"
    await pool.close()


async def test_a_variant_is_measured_once_before_its_first_load(tmp_path: Path) -> None:
    scales, footprints = CountedScales(), Footprints()
    pool = ModelPool(RuntimeSettings(), clock=SystemClock(), hosting=Hosting(ONE_FITS, footprints, scales))
    (cat,) = await hosting(pool, tmp_path, "cat")
    await footprints.remember(cat.digest, TAKES)
    await hosting(pool, tmp_path, "cat", "dog")
    assert scales.measured == ["cat", "dog"]
    await pool.close()


async def test_the_self_test_measures_what_a_variant_takes_and_remembers_it(tmp_path: Path) -> None:
    model = make_mlp(tmp_path / "m", sizes=(64, 1500, 1500, 10))
    with ThreadPoolExecutor(1) as disk:
        footprints = Footprints(tmp_path / "footprints.json", disk=disk)
        result = await SelfTester(SelfTestLimits(max_batch=32), footprints).test(model.manifest, model.folder)
    found = Footprints(tmp_path / "footprints.json").get(model.digest)
    assert found is not None
    assert found == result.footprint
    file_bytes = model.manifest.size_bytes
    # Its weights, and not twice those: glibc's heaps would have kept the file's copy.
    assert file_bytes * 0.9 < found.resident_bytes < file_bytes * 1.5
    assert file_bytes * 1.5 < found.peak_bytes < file_bytes * 3
    assert 0 < found.load_s < 30


async def test_a_variant_that_fails_its_self_test_has_no_figure(tmp_path: Path) -> None:
    model = make_echo(tmp_path)
    (model.folder / "model.onnx").write_bytes(b"no model")
    assert await SelfTester(SelfTestLimits()).measure(model.manifest, model.folder) is None


_CYCLES = """
import asyncio, sys
from pathlib import Path
from core.clock import SystemClock
from core.process_metrics import resident_bytes
from edge_agent.runtime.memory import keep_malloc_tight, release_freed
keep_malloc_tight()
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import RuntimeSettings
from tests.support.edge_models import make_mlp

async def main():
    pool = ModelPool(RuntimeSettings(), clock=SystemClock())
    folder, wide = Path(sys.argv[1]), (1200, 1700, 2200)
    models = [make_mlp(folder / str(n), name=f"m{n}", sizes=(64, n, 1000, 10)) for n in wide]
    for model in models:
        await pool.load(model.manifest, model.digest, model.folder)
    taken = sum(model.manifest.size_bytes for model in models)
    before = resident_bytes()
    for _ in range(4):
        for model in models:
            await pool.park(model.manifest.model)
        empty = resident_bytes()
        for model in models:
            await pool.keep_resident(model.manifest.model)
    print(taken, before - empty, resident_bytes() - before)
    await pool.close()

asyncio.run(main())
"""


def test_a_model_that_leaves_gives_its_memory_back_time_after_time(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CYCLES, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    taken_bytes, given_back_bytes, grown_bytes = map(int, done.stdout.split())
    assert given_back_bytes > 0.95 * taken_bytes
    assert grown_bytes < 2 << 20


@pytest.fixture
async def face(tmp_path: Path) -> AsyncIterator["pb_grpc.GRPCInferenceServiceAsyncStub"]:
    pool = pool_of(ResidencyTerms(1 << 30))
    await hosting(pool, tmp_path, "cat")
    credentials = TransportCredentials.local()
    front = GrpcFront(
        plane_over(pool),
        bind=Address("127.0.0.1", 0),
        credentials=credentials.server,
        clock=SystemClock(),
        version="1",
    )
    channel = open_channel(await front.start(), credentials)
    yield pb_grpc.GRPCInferenceServiceStub(channel)
    await channel.close()
    await front.stop(1.0)
    await pool.close()


async def test_the_repository_over_grpc_unloads_and_loads(face: "pb_grpc.GRPCInferenceServiceAsyncStub") -> None:
    async def state() -> tuple[str, str]:
        (entry,) = (await face.RepositoryIndex(pb.RepositoryIndexRequest())).models
        return entry.state, entry.reason

    assert await state() == ("READY", "")
    await face.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="cat"))
    assert await state() == ("UNAVAILABLE", "unloaded by hand")
    assert not (await face.ModelReady(pb.ModelReadyRequest(name="cat"))).ready
    with pytest.raises(grpc.aio.AioRpcError, match="unloaded by hand") as refusal:
        await face.ModelInfer(protobuf_body.encode_request(asked("cat")))
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    await face.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="cat"))
    assert await state() == ("READY", "")
    response = await face.ModelInfer(protobuf_body.encode_request(asked("cat")))
    assert response.model_name == "cat"


async def test_a_successor_of_a_model_that_was_unloaded_by_hand_is_not_loaded_either(tmp_path: Path) -> None:
    pool = pool_of(ResidencyTerms(1 << 30))
    await hosting(pool, tmp_path, "cat")
    await pool.park("cat")
    successor = make_echo(tmp_path / "2", name="cat", version=2)
    await pool.load(successor.manifest, successor.digest, successor.folder)
    assert pool.running() == {"cat": successor.digest}
    assert pool.residency("cat").reason == "unloaded by hand"
    await pool.close()


async def test_a_watch_goes_on_through_all_loads(tmp_path: Path) -> None:
    pool = pool_of()
    plane = plane_over(pool)
    await hosting(pool, tmp_path, "cat", "dog")
    watch = pool.find("cat").watch()
    for name in ("cat", "dog", "cat", "dog", "cat"):
        await answer(plane, name)
    watch.stop()
    await answer(plane, "cat")
    assert watch.vitals().runs == 3
    await pool.close()


async def test_status_and_metrics_say_what_is_in_memory(tmp_path: Path) -> None:
    registry, pool = Registry(), pool_of()
    register_residency(registry, pool)
    plane = plane_over(pool)
    await hosting(pool, tmp_path, "cat", "dog")
    await answer(plane, "cat")
    view = MemoryView.of(pool)
    assert {name: model.state for name, model in view.models.items()} == {"cat": "resident", "dog": "cold"}
    assert (view.budget_bytes, view.taken_bytes) == (20 * MIB, pool.taken_bytes)
    found = numbers(written(registry.families(), is_open_metrics=True))
    dog = frozenset({("model", "dog")})
    assert found["nanofleet_model_memory_bytes", dog] == 0
    assert found["nanofleet_model_loads_total", frozenset({("outcome", "loaded")})] == 3
    assert found["nanofleet_model_evictions_total", frozenset()] == 2
    assert found["nanofleet_cold_requests_total", frozenset({("outcome", "held")})] == 1
    await pool.close()


@pytest.mark.parametrize(
    ("settings", "claim"),
    [
        (ResidencySettings(budget_bytes=123), lambda budget: budget == 123),
        (ResidencySettings(), lambda budget: budget > 1 << 20),
        (ResidencySettings(reserve_bytes=1 << 50), lambda budget: budget == 0),
    ],
)
def test_the_budget_is_what_is_said_or_what_the_machine_has_left(
    settings: ResidencySettings, claim: Callable[[int], bool]
) -> None:
    assert claim(hosting_by(settings, {}, Footprints(), CountedScales()).terms.budget_bytes)
