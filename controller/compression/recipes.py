"""The ways to make a model smaller or faster, each from one ONNX file to another. Runs in the child process.

    int8-static    weights int8 per channel, activations uint8 with ranges from calibration data (QDQ form). Linear
                   layers give float outputs, so that final scores keep their resolution: 8-bit scores tie for the
                   first place (7 of 899 digits, measured), and ties always escalate.
    int8-dynamic   weights int8 per channel, activations uint8 with ranges taken at run time. Refused for
                   convolutions, where it can collapse (99 % to 0 %, and five times slower, both measured).
    fp16           weights and arithmetic in half precision, inputs and outputs as before. Half the size; on a CPU
                   without half-precision kernels the runtime computes in float32 and it is no faster.

Every result is stripped of what the exporter left in it (node metadata with stack traces and absolute build paths,
documentation, unused operator sets): a derived file should name no machine, and tiny models halve. The original is kept
as it was uploaded, byte for byte, because its digest is what its publisher knows.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from controller.compression.datasets import load_samples
from controller.compression.evaluate import batches, require_fit
from controller.compression.inspect import nodes_of
from controller.compression.model import Dataset, ModelBundle
from controller.compression.session import open_session
from core.errors import InvalidModel, InvalidRequest
from core.tensors import Array

# Between the 200 and 500 samples after which ranges stop changing.
MAX_CALIBRATION_SAMPLES = 500
_LINEAR = ("Conv", "Gemm", "MatMul")
# Layers that may stay in 8 bits between linear ones.
_PASSING = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")


def quantise(recipe: str, bundle: ModelBundle, target: Path, calibration: Dataset | None) -> None:
    """Write what `recipe` makes of the model in `bundle` to `target`, as one file.

    Raises:
        InvalidModel: the recipe does not fit the model.
        InvalidRequest: the calibration data is missing or does not fit, or there is no such recipe.
    """
    if recipe not in _RECIPES:
        raise InvalidRequest(f"recipe: expected one of {', '.join(_RECIPES)}, got {recipe!r}")
    try:
        _RECIPES[recipe](bundle, target, calibration)
        _strip(target)
    except InvalidRequest:
        raise
    # The tools raise whatever they come across in a graph that they do not understand.
    except Exception as error:
        raise InvalidModel(f"recipe {recipe}: does not fit this model: {type(error).__name__}: {error}") from error


def _int8_static(bundle: ModelBundle, target: Path, calibration: Dataset | None) -> None:
    if calibration is None:
        raise InvalidRequest("recipe int8-static: expected calibration data; give the digest of an .npz data set")
    reader = _CalibrationReader(bundle, calibration)
    with _prepared("int8-static", bundle, _LINEAR) as (prepared, excluded):
        quantize_static(
            prepared,
            target,
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_LINEAR, *_PASSING],
            nodes_to_exclude=excluded,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )


def _int8_dynamic(bundle: ModelBundle, target: Path, _calibration: Dataset | None) -> None:
    with _prepared("int8-dynamic", bundle, ("Gemm", "MatMul")) as (prepared, excluded):
        if any(node.op_type == "Conv" for node in nodes_of(onnx.load(prepared).graph)):
            raise InvalidModel(
                "recipe int8-dynamic: refused for a model with convolutions, whose accuracy it can destroy; "
                "use int8-static with calibration data"
            )
        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=["Gemm", "MatMul"],
            nodes_to_exclude=excluded,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


def _fp16(bundle: ModelBundle, target: Path, _calibration: Dataset | None) -> None:
    model = convert_float_to_float16(onnx.load(bundle.entry_path), keep_io_types=True)
    # It appends its casts at the end, where ONNX wants producers before consumers.
    OnnxModel(model).topological_sort(is_deterministic=True)
    onnx.save(model, target)


_RECIPES = {"int8-static": _int8_static, "int8-dynamic": _int8_dynamic, "fp16": _fp16}


class _CalibrationReader(CalibrationDataReader):  # type: ignore[misc]  # the library is untyped
    """Hands the calibration samples to the quantizer, a few at a time."""

    def __init__(self, bundle: ModelBundle, calibration: Dataset) -> None:
        (argument, *_), inputs = open_session(bundle).get_inputs(), load_samples(calibration.path).inputs
        name = require_fit(open_session(bundle).get_inputs(), inputs)
        self._batches: Iterator[dict[str, Array]] = iter(
            [{name: batch} for batch in batches(argument, inputs[:MAX_CALIBRATION_SAMPLES])]
        )

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


@contextmanager
def _prepared(recipe: str, bundle: ModelBundle, operators: tuple[str, ...]) -> Iterator[tuple[Path, list[str]]]:
    """Lend the model with shapes inferred and nodes fused, and the names of nodes that cannot be quantised.

    Raises:
        InvalidModel: none of `operators` with constant weights is in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Symbolic shape inference needs sympy and helps transformers only; ONNX's own follows the optimisation.
        # Given as a value, with its external data in it: the tool's own intermediate files lose their neighbours.
        quant_pre_process(onnx.load(bundle.entry_path), prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        _name_nodes(model.graph.node)
        _flatten_biases(model.graph, constants)
        excluded = [node.name for node in model.graph.node if _has_odd_bias(node, constants)]
        if not any(
            node.op_type in operators and node.name not in excluded and node.input[1] in constants
            for node in model.graph.node
        ):
            raise InvalidModel(
                f"recipe {recipe}: expected a {' or '.join(operators)} with constant weights, found none; leave it out"
            )
        onnx.save(model, prepared)
        yield prepared, excluded


def _name_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    """Give every node a name of its own, by which it can be excluded."""
    for position, node in enumerate(nodes):
        node.name = f"{position}_{node.op_type}"


def _flatten_biases(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> None:
    """Make Gemm's biases of shape (1, N) vectors, which means the same to Gemm.

    Fusing MatMul and Add leaves such biases, and the static quantizer fails on them (microsoft/onnxruntime#24815).
    """
    for name in {node.input[2] for node in graph.node if node.op_type == "Gemm" and len(node.input) == 3}:
        is_only_gemms = all(node.op_type == "Gemm" for node in graph.node if name in node.input)
        bias = constants.get(name)
        if bias is not None and is_only_gemms and len(bias.dims) == 2 and bias.dims[0] == 1:
            del bias.dims[0]


def _has_odd_bias(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Say whether this is a Gemm whose bias is no vector with one number for each output, which cannot be quantised."""
    if node.op_type != "Gemm" or len(node.input) < 3 or node.input[1] not in constants:
        return False
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    outputs = constants[node.input[1]].dims[0 if is_transposed else 1]
    bias = constants.get(node.input[2])
    return bias is None or list(bias.dims) != [outputs]


def _strip(path: Path) -> None:
    """Remove from the model in `path` what only its makers need."""
    model = onnx.load(path)
    del model.metadata_props[:]
    model.doc_string = ""
    _strip_graph(model.graph)
    used = {node.domain for node in nodes_of(model.graph)} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.save(model, path)


def _strip_graph(graph: onnx.GraphProto) -> None:
    del graph.metadata_props[:]
    graph.doc_string = ""
    for part in chain[Any](graph.input, graph.output, graph.value_info, graph.initializer, graph.node):
        part.doc_string = ""
        del part.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            # Writing to an unset field would set it, and the node would have two values for one attribute.
            for nested in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _strip_graph(nested)
