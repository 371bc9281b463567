"""Recipes, evaluation and data sets, each in a real child process."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from controller.compression.model import RECIPES, Dataset, EvaluationTask, ModelBundle, ScoreRule
from controller.compression.workshop import ChildWorkshop
from core.errors import InvalidModel, InvalidRequest
from core.manifest import ScoreKind
from core.tensors import Array
from tests.support.onnx_models import (
    bundle_of,
    conv_net,
    dense_net,
    digits,
    external_weights,
    model_of,
    npy_header,
    npz,
    with_build_paths,
    zipped,
)

WORKSHOP = ChildWorkshop(timeout_s=120, memory_bytes=1 << 30, max_file_bytes=1 << 28)
RANDOM = np.random.default_rng(3)
NO_LABELS: Array = np.zeros(64, np.int64)


def dataset(folder: Path, content: bytes) -> Dataset:
    path = folder / "dataset"
    path.write_bytes(content)
    return Dataset(path)


def inputs_for(shape: tuple[int, ...], samples: int = 64) -> Array:
    array: Array = RANDOM.normal(size=(samples, *shape)).astype(np.float32)
    return array


async def quantised(recipe: str, bundle: ModelBundle, inputs: Array) -> ModelBundle:
    folder = bundle.folder / recipe
    folder.mkdir()
    data = dataset(folder, npz(inputs=inputs, labels=np.zeros(len(inputs), np.int64)))
    await WORKSHOP.quantise(recipe, bundle, folder / "model.onnx", data)
    return ModelBundle(folder, "model.onnx")


def weight_types(bundle: ModelBundle) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(bundle.entry_path).graph.initializer if len(tensor.dims) > 1}


# ---- recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
async def test_a_dense_net_keeps_its_signature_and_gets_smaller(tmp_path: Path, recipe: str) -> None:
    bundle = bundle_of(tmp_path, dense_net())

    made = await quantised(recipe, bundle, inputs_for((8,)))

    assert await WORKSHOP.inspect(made) == await WORKSHOP.inspect(bundle)
    expected = onnx.TensorProto.FLOAT16 if recipe == "fp16" else onnx.TensorProto.INT8
    assert weight_types(made) == {expected}


@pytest.mark.parametrize("recipe", ["int8-static", "fp16"])
async def test_a_convolutional_net_keeps_its_answers(tmp_path: Path, recipe: str) -> None:
    bundle = bundle_of(tmp_path, conv_net())
    inputs = inputs_for((1, 8, 8))
    made = await quantised(recipe, bundle, inputs)
    labels = await labels_of(bundle, inputs)

    evaluated = await WORKSHOP.evaluate(EvaluationTask(made, dataset(tmp_path, npz(inputs=inputs, labels=labels))))

    assert evaluated.accuracy_ratio is not None
    assert evaluated.accuracy_ratio >= 0.9


async def labels_of(bundle: ModelBundle, inputs: Array) -> Array:
    """Return the classes that the reference implementation of ONNX gives."""
    from onnx.reference import ReferenceEvaluator

    (scores,) = ReferenceEvaluator(str(bundle.entry_path)).run(None, {"x": inputs})
    labels: Array = np.argmax(scores, axis=1)
    return labels


async def test_dynamic_quantisation_is_refused_for_convolutions(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="int8-dynamic: refused for a model with convolutions"):
        await quantised("int8-dynamic", bundle_of(tmp_path, conv_net()), inputs_for((1, 8, 8)))


@pytest.mark.parametrize("recipe", RECIPES)
async def test_a_scikit_learn_classifier_keeps_its_accuracy(tmp_path: Path, recipe: str) -> None:
    bundle = bundle_of(tmp_path, digits().model)
    evaluation = dataset(tmp_path, digits().evaluation)
    target = tmp_path / "made.onnx"
    (tmp_path / "calibration").write_bytes(digits().calibration)
    await WORKSHOP.quantise(recipe, bundle, target, Dataset(tmp_path / "calibration"))

    before = await WORKSHOP.evaluate(EvaluationTask(bundle, evaluation))
    after = await WORKSHOP.evaluate(EvaluationTask(ModelBundle(tmp_path, "made.onnx"), evaluation))

    assert before.accuracy_ratio is not None
    assert after.accuracy_ratio == pytest.approx(before.accuracy_ratio, abs=0.01)
    assert target.stat().st_size < len(digits().model)


@pytest.mark.parametrize("recipe", RECIPES)
async def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path, recipe: str) -> None:
    bundle = bundle_of(tmp_path, digits().model)
    calibration = dataset(tmp_path, digits().calibration)
    for name in ("a", "b"):
        await WORKSHOP.quantise(recipe, bundle, tmp_path / name, calibration)

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
async def test_build_paths_do_not_reach_a_variant(tmp_path: Path, recipe: str) -> None:
    made = await quantised(recipe, bundle_of(tmp_path, with_build_paths(dense_net())), inputs_for((8,)))

    content = made.entry_path.read_bytes()
    assert b"builder" not in content
    assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("recipe", RECIPES)
async def test_external_weights_end_up_in_the_one_file(tmp_path: Path, recipe: str) -> None:
    model = dense_net()
    weights = external_weights(model, "weights.bin")

    made = await quantised(recipe, bundle_of(tmp_path, model, weights_bin=weights), inputs_for((8,)))

    assert (await WORKSHOP.inspect(made)).inputs[0].name == "x"


@pytest.mark.parametrize("recipe", ["int8-static", "int8-dynamic"])
async def test_a_model_without_weights_is_refused(tmp_path: Path, recipe: str) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], inputs={"x": ["n", 8]}, outputs={"y": ["n", 8]})

    with pytest.raises(InvalidModel, match="with constant weights, found none"):
        await quantised(recipe, bundle_of(tmp_path, model), inputs_for((8,)))


async def test_static_quantisation_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected calibration data"):
        await WORKSHOP.quantise("int8-static", bundle_of(tmp_path, dense_net()), tmp_path / "made.onnx", None)


# ---- evaluation -----------------------------------------------------------------------------------------------


async def test_without_data_only_latency_is_measured(tmp_path: Path) -> None:
    evaluated = await WORKSHOP.evaluate(EvaluationTask(bundle_of(tmp_path, dense_net())))

    assert 0 < evaluated.latency_p50_us <= evaluated.latency_p90_us
    assert (evaluated.accuracy_ratio, evaluated.samples, evaluated.fit) == (None, None, None)


async def test_accuracy_is_the_share_of_right_answers(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, dense_net())
    inputs = inputs_for((8,), samples=100)
    labels = await labels_of(bundle, inputs)
    labels[:25] = (labels[:25] + 1) % 3

    evaluated = await WORKSHOP.evaluate(EvaluationTask(bundle, dataset(tmp_path, npz(inputs=inputs, labels=labels))))

    assert (evaluated.accuracy_ratio, evaluated.samples) == (0.75, 100)


async def test_a_fixed_batch_is_fed_as_it_is(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, dense_net(batch=4))
    data = dataset(tmp_path, npz(inputs=inputs_for((8,), samples=12), labels=NO_LABELS[:12]))

    assert (await WORKSHOP.evaluate(EvaluationTask(bundle, data))).samples == 12


async def test_a_cascade_is_fitted_on_the_evaluation_data(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, digits().model)
    rule = ScoreRule("probabilities", ScoreKind.PROBABILITIES, 0.01)

    evaluated = await WORKSHOP.evaluate(EvaluationTask(bundle, dataset(tmp_path, digits().evaluation), rule))

    assert evaluated.fit is not None
    assert evaluated.fit.kept_error_ratio <= 0.01
    assert 0.5 < evaluated.fit.kept_ratio < 1
    assert 0 < evaluated.fit.threshold < 1


async def test_an_unknown_score_output_is_refused(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, digits().model)
    rule = ScoreRule("scores", ScoreKind.LOGITS, 0.01)

    with pytest.raises(InvalidRequest, match="a score output among label, probabilities, got 'scores'"):
        await WORKSHOP.evaluate(EvaluationTask(bundle, dataset(tmp_path, digits().evaluation), rule))


# ---- data sets ------------------------------------------------------------------------------------------------


async def evaluation_refusal(folder: Path, content: bytes) -> str:
    with pytest.raises(InvalidRequest) as refused:
        await WORKSHOP.evaluate(EvaluationTask(bundle_of(folder, dense_net()), dataset(folder, content)))
    assert not isinstance(refused.value, InvalidModel)
    return str(refused.value)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: b"no zip at all", "expected an .npz file"),
        (lambda: npz(inputs=inputs_for((8,)), labels=NO_LABELS)[:-40], "expected an .npz file"),
        (lambda: npz(inputs=inputs_for((8,))), "expected the arrays inputs and labels"),
        (lambda: npz(inputs=inputs_for((8,)), labels=NO_LABELS, more=NO_LABELS), "expected the arrays"),
        (lambda: npz(inputs=np.array([{}] * 64), labels=NO_LABELS), "pickled objects are never read"),
        (lambda: npz(inputs=inputs_for((8,)), labels=NO_LABELS.astype(np.int32)), "labels (N,) int64"),
        (lambda: npz(inputs=inputs_for((8,)), labels=NO_LABELS[:3]), "one label per input"),
        (lambda: npz(inputs=inputs_for((8,))[:0], labels=NO_LABELS[:0]), "1 to 1000000 samples"),
        (lambda: npz(inputs=inputs_for((9,)), labels=NO_LABELS), "inputs of shape ['n', 8], got [64, 9]"),
        (lambda: npz(inputs=inputs_for((8,)).astype(float), labels=NO_LABELS), "tensor(float), got float64"),
        (lambda: zipped({"inputs.npy": bytes(300 << 20), "labels.npy": b""}), "expected at most 268435456 bytes"),
        (lambda: zipped({"inputs.npy": npy_header("(100000, 100000)"), "labels.npy": b""}), "does not fit 0 bytes"),
        (lambda: zipped({"inputs.npy": npy_header("(-1, -1)"), "labels.npy": b""}), "does not fit"),
        (lambda: zipped({"inputs.npy": npy_header("()" * 30), "labels.npy": b""}), "expected an .npz file"),
    ],
)
async def test_a_data_set_that_does_not_fit_is_refused(
    tmp_path: Path, make: Callable[[], bytes], expected: str
) -> None:
    assert expected in await evaluation_refusal(tmp_path, make())
