"""Small ONNX models and data sets, good and hostile, made on the spot."""

import io
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from controller.compression.model import ModelBundle
from core.tensors import Array

FLOAT = TensorProto.FLOAT


def model_of(
    nodes: list[Any],
    *,
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, Array] | None = None,
    opset: int = 18,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def dense_net(*, batch: object = "n") -> onnx.ModelProto:
    """Gemm → Relu → MatMul: (n, 8) → (n, 3) logits, its weights fixed by a seed."""
    random = np.random.default_rng(1)
    weights = {
        "w1": random.normal(size=(8, 16)).astype(np.float32),
        "b1": random.normal(size=16).astype(np.float32),
        "w2": random.normal(size=(16, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    return model_of(nodes, inputs={"x": [batch, 8]}, outputs={"y": [batch, 3]}, weights=weights)


def conv_net() -> onnx.ModelProto:
    """Conv → Relu → MaxPool → Flatten → Gemm: (n, 1, 8, 8) → (n, 4) logits."""
    random = np.random.default_rng(2)
    weights = {
        "k": random.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "kb": random.normal(size=4).astype(np.float32),
        "w": random.normal(size=(36, 4)).astype(np.float32),
        "b": random.normal(size=4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "k", "kb"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    return model_of(nodes, inputs={"x": ["n", 1, 8, 8]}, outputs={"y": ["n", 4]}, weights=weights)


def with_build_paths(model: onnx.ModelProto) -> onnx.ModelProto:
    """Leave in `model` what an exporter leaves: traces with paths of the machine that built it."""
    model.graph.node[0].doc_string = "/home/builder/train.py, line 3"
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.stack_trace", "File /home/builder/train.py, line 3"
    return model


def external_weights(model: onnx.ModelProto, location: str, **fields: int) -> bytes:
    """Move the first weight of `model` to `location`; return its bytes."""
    tensor = model.graph.initializer[0]
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": len(content), **fields}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return content


def bundle_of(folder: Path, model: onnx.ModelProto | bytes, **extra_files: bytes) -> ModelBundle:
    """Write `model` and its extra files (`weights_bin` becomes weights.bin) to `folder`."""
    content = model if isinstance(model, bytes) else model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    names = {name.replace("_", "."): extra for name, extra in extra_files.items()}
    for name, extra in names.items():
        (folder / name).write_bytes(extra)
    return ModelBundle(folder, "model.onnx", tuple(names))


def npz(**arrays: Array) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npy_header(shape: str, descr: str = "<f4") -> bytes:
    """Return the head of an .npy file that claims `shape`."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Digits(NamedTuple):
    """A trained classifier of handwritten digits, and the images it has not seen."""

    model: bytes
    calibration: bytes
    evaluation: bytes


@cache
def digits() -> Digits:
    """Train a multi-layer perceptron on half of scikit-learn's digits and export it with skl2onnx."""
    from skl2onnx import to_onnx
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        classifier = MLPClassifier((32,), max_iter=60, random_state=0).fit(images[::2], labels[::2])
    model = to_onnx(classifier, images[:1], options={"zipmap": False}, target_opset=18)
    return Digits(
        model.SerializeToString(),
        npz(inputs=images[::2][:200], labels=labels[::2][:200].astype(np.int64)),
        npz(inputs=images[1::2], labels=labels[1::2].astype(np.int64)),
    )
