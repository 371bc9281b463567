"""Golden inputs at publish: the same bytes for the same model, a few small samples, and what it answers."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from controller.compression.golden import MAX_BYTES, MAX_SAMPLES, write_golden
from controller.compression.model import Dataset, Golden, GoldenOrder, ModelBundle
from controller.compression.session import open_session
from core.tensors import Array
from tests.support.onnx_models import bundle_of, conv_net, dense_net, model_of, npz


def golden(bundle: ModelBundle, *, max_batch: int = 32, dataset: Dataset | None = None) -> tuple[Golden, Path]:
    path = bundle.folder / "golden"
    return write_golden(open_session(bundle), bundle, GoldenOrder(path, max_batch, dataset)), path


def arrays_of(path: Path) -> dict[str, Array]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, dense_net())
    first = golden(bundle)[1].read_bytes()
    assert golden(bundle)[1].read_bytes() == first


def test_the_outputs_are_what_the_model_answers(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, dense_net())
    found, path = golden(bundle)
    arrays = arrays_of(path)
    session = onnxruntime.InferenceSession(str(bundle.entry_path))
    (answer,) = session.run(None, {"x": arrays["input.x"]})
    (name,) = [output.name for output in session.get_outputs()]
    assert found.samples == len(arrays["input.x"]) == MAX_SAMPLES
    assert np.array_equal(arrays[f"output.{name}"], answer)


def test_a_model_that_does_not_batch_gets_whole_inputs_one_after_another(tmp_path: Path) -> None:
    _, path = golden(bundle_of(tmp_path, dense_net()), max_batch=1)
    assert arrays_of(path)["input.x"].shape == (MAX_SAMPLES, 1, 8)


def test_samples_come_from_the_data_where_it_fits(tmp_path: Path) -> None:
    inputs = np.arange(80, dtype=np.float32).reshape(10, 8)
    (tmp_path / "data").write_bytes(npz(inputs=inputs, labels=np.zeros(10, np.int64)))
    _, path = golden(bundle_of(tmp_path, dense_net()), dataset=Dataset(tmp_path / "data"))
    assert np.array_equal(arrays_of(path)["input.x"], inputs[:MAX_SAMPLES])


def test_large_inputs_are_few(tmp_path: Path) -> None:
    shape: list[str | int | None] = ["n", 3, 224, 224]
    node = helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0, axes=[1, 2, 3])
    model = helper.make_model(
        helper.make_graph(
            [node],
            "means",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    found, path = golden(bundle_of(tmp_path, model))
    assert found.samples == 1
    assert path.stat().st_size > MAX_BYTES


def test_a_model_of_indices_gets_indices_that_any_table_has(tmp_path: Path) -> None:
    table = helper.make_tensor("table", TensorProto.FLOAT, [2, 3], [float(at) for at in range(6)])
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "ids"], ["y"])],
            "embedding",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "length", 3])],
            [table],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    _, path = golden(bundle_of(tmp_path, model))
    assert set(arrays_of(path)["input.ids"].ravel()) <= {0, 1}


@pytest.mark.parametrize("net", [dense_net, conv_net])
def test_float32_models_are_compared_tightly(tmp_path: Path, net: object) -> None:
    assert callable(net)
    assert golden(bundle_of(tmp_path, net()))[0].rtol == 1e-3


def test_quantised_models_are_compared_loosely(tmp_path: Path) -> None:
    quantise = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])
    restore = helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"])
    steps: dict[str, Array] = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    model = model_of([quantise, restore], inputs={"x": ["n", 4]}, outputs={"y": ["n", 4]}, weights=steps)
    assert golden(bundle_of(tmp_path, model))[0].rtol == 0.1
