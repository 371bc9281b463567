"""The pool of running models: loading, switching under load, unloading."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from core.clock import SystemClock
from core.digest import digest_of
from core.errors import InvalidModel, ModelNotReady, UnknownModel
from core.ids import ModelName
from core.manifest import Batching, Cascade, File, Signature
from core.open_inference.messages import InferRequest
from core.tensors import Array, Datatype, Tensor
from edge_agent.runtime.pool import LoadedModel, ModelPool
from edge_agent.runtime.session import OnnxModel, RunTime
from edge_agent.settings import RuntimeSettings
from tests.support.edge_models import cascade_to, make_echo, make_mlp, mlp_scores
from tests.support.edge_plane import echo_manifest, echo_model, plane_with, request_of


def pool() -> ModelPool:
    return ModelPool(RuntimeSettings(), clock=SystemClock())


async def ask_row(models: ModelPool, values: Array) -> Array:
    plane = await plane_with(*models.models())
    answer = await plane.answer(InferRequest("digits", (Tensor("x", Datatype.FP32, values),)))
    return answer.response.outputs[0].array


async def test_a_loaded_model_computes_what_its_weights_say(tmp_path: Path) -> None:
    models, mlp = pool(), make_mlp(tmp_path)
    await models.load(mlp.manifest, mlp.digest, mlp.folder)
    row = np.linspace(-1, 1, 64, dtype=np.float32)[np.newaxis]
    np.testing.assert_allclose(await ask_row(models, row), mlp_scores(row), rtol=1e-4, atol=1e-5)
    assert models.running() == {"digits": mlp.digest}


async def test_a_new_variant_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    models = pool()
    old, new = make_mlp(tmp_path / "1", version=1), make_mlp(tmp_path / "2", version=2, seed=8)
    await models.load(old.manifest, old.digest, old.folder)
    await models.load(new.manifest, new.digest, new.folder)
    assert models.running() == {"digits": new.digest}
    assert models.find("digits").version == "2"


async def test_a_model_is_watched_until_the_watch_is_stopped(tmp_path: Path) -> None:
    models, mlp = pool(), make_mlp(tmp_path)
    await models.load(mlp.manifest, mlp.digest, mlp.folder)
    row = np.zeros((1, 64), np.float32)
    watch = models.watch(ModelName("digits"))
    await ask_row(models, row)
    await ask_row(models, row)
    watch.stop()
    await ask_row(models, row)
    assert watch.vitals().runs == 2


async def test_what_the_old_variant_has_accepted_it_still_answers() -> None:
    models = pool()
    old, new = slow_model(version=1), echo_model(version=2)
    await models.host(old)
    plane = await plane_with(old)
    accepted = [plane.ask(request_of()) for _ in range(3)]
    await models.host(new)
    assert [answer.result().response.model_version for answer in accepted] == ["1", "1", "1"]


def slow_model(*, version: int) -> LoadedModel:
    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        return inputs

    manifest = echo_manifest(version=version, max_batch=1)
    return LoadedModel(
        manifest,
        manifest.digest(),
        run,
        run_time=RunTime(1.0, 1.0),
        settings=RuntimeSettings(),
        clock=SystemClock(),
    )


@pytest.mark.parametrize(("shape", "is_in_loop"), [((-1, 3), True), ((-1, -1), False)])
async def test_a_model_whose_rows_vary_in_size_never_runs_in_the_loop(
    shape: tuple[int, ...], *, is_in_loop: bool
) -> None:
    threads = []

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        threads.append(threading.current_thread())
        return inputs

    takes = (Signature(name="x", datatype=Datatype.FP32, shape=shape),)
    manifest = echo_manifest().model_copy(update={"inputs": takes})
    quick = RunTime(0.0, 0.0)
    model = LoadedModel(
        manifest, manifest.digest(), run, run_time=quick, settings=RuntimeSettings(), clock=SystemClock()
    )
    await (await plane_with(model)).answer(request_of())
    assert (threads == [threading.main_thread()]) is is_in_loop


async def test_a_file_that_is_no_model_leaves_the_running_one_alone(tmp_path: Path) -> None:
    models, good, bad = pool(), make_mlp(tmp_path / "1"), make_mlp(tmp_path / "2", version=2)
    await models.load(good.manifest, good.digest, good.folder)
    (bad.folder / "model.onnx").write_bytes(b"no model at all")
    file = File(path="model.onnx", digest=digest_of(b"no model at all"), size_bytes=15)
    with pytest.raises(InvalidModel, match="does not load"):
        await models.load(bad.manifest.model_copy(update={"files": (file,)}), bad.digest, bad.folder)
    assert models.running() == {"digits": good.digest}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": (Signature(name="y", datatype=Datatype.FP32, shape=(-1, 64)),)}, "input 'y'"),
        ({"inputs": (Signature(name="x", datatype=Datatype.INT8, shape=(-1, 64)),)}, "the manifest says INT8"),
        ({"outputs": (Signature(name="labels", datatype=Datatype.INT64, shape=(-1,)),)}, "output 'labels'"),
        (
            {
                "inputs": (Signature(name="x", datatype=Datatype.FP32, shape=(1, 64)),),
                "batching": Batching(max_batch=4),
            },
            "needs a variable first dimension",
        ),
    ],
)
def test_a_model_that_contradicts_its_manifest_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    mlp = make_mlp(tmp_path)
    manifest = mlp.manifest.model_copy(update=change)
    with pytest.raises(InvalidModel, match=message):
        OnnxModel(manifest, mlp.folder)


def test_warming_up_measures_one_row_and_a_full_batch(tmp_path: Path) -> None:
    mlp = make_mlp(tmp_path, sizes=(64, 512, 10))
    single_s, full_s = OnnxModel(mlp.manifest, mlp.folder).warm_up(max_batch=64)
    assert 0 < single_s < full_s


async def test_an_unloaded_model_is_unknown(tmp_path: Path) -> None:
    models, mlp = pool(), make_mlp(tmp_path)
    await models.load(mlp.manifest, mlp.digest, mlp.folder)
    await models.unload(ModelName("digits"))
    await models.unload(ModelName("digits"))
    assert models.running() == {}
    with pytest.raises(UnknownModel, match="runs no model"):
        models.find("digits")


async def test_a_model_that_is_being_loaded_for_the_first_time_is_not_ready(tmp_path: Path) -> None:
    models, mlp = pool(), make_mlp(tmp_path)
    loading = asyncio.create_task(models.load(mlp.manifest, mlp.digest, mlp.folder))
    await asyncio.sleep(0)
    with pytest.raises(ModelNotReady, match="being loaded"):
        models.find("digits")
    await loading
    assert models.find("digits").version == "1"


async def test_whoever_watches_hears_of_every_change(tmp_path: Path) -> None:
    models, mlp, changes = pool(), make_mlp(tmp_path), []
    models.on_change(lambda: changes.append(len(models.models())))
    await models.load(mlp.manifest, mlp.digest, mlp.folder)
    await models.unload(ModelName("digits"))
    assert changes == [1, 0]


async def test_closing_unloads_everything(tmp_path: Path) -> None:
    models, mlp = pool(), make_mlp(tmp_path)
    await models.load(mlp.manifest, mlp.digest, mlp.folder)
    await models.close()
    assert models.running() == {}


async def test_the_confidence_of_a_loaded_model_comes_from_its_score_output(tmp_path: Path) -> None:
    cascade: Cascade = cascade_to(threshold=0.5)
    models, echo = pool(), make_echo(tmp_path, name="digits", cascade=cascade)
    await models.load(echo.manifest, echo.digest, echo.folder)
    plane = await plane_with(*models.models())
    row = np.array([[0, 5, 0, 0]], dtype=np.float32)
    answer = await plane.answer(InferRequest("digits", (Tensor("x", Datatype.FP32, row),)))
    assert answer.confidence == pytest.approx(np.exp(5) / (np.exp(5) + 3))
