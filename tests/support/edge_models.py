"""Small ONNX models with seeded weights, ready for an agent to load: for tests and benchmarks.

    mlp = make_mlp(folder, name="digits", sizes=(64, 16, 10))
    await pool.load(mlp.manifest, mlp.digest, mlp.folder)

Built with onnx.helper alone: the same arguments give the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from core.chunks import chunk_of
from core.digest import Digest, digest_of, digest_of_file
from core.manifest import Batching, Cascade, File, Lineage, Manifest, ScoreKind, Signature
from core.tensors import Array, Datatype
from tests.support.variants import MadeVariant

INPUT = "x"
OUTPUT = "scores"
# Below what the pinned ONNX Runtime reads at most.
_OPSET = 18
_IR_VERSION = 9


@dataclass(frozen=True, slots=True)
class BuiltModel:
    manifest: Manifest
    digest: Digest
    folder: Path


def cascade_to(model: str = "large", *, threshold: float = 0.5, kind: ScoreKind = ScoreKind.LOGITS) -> Cascade:
    return Cascade(escalate_to=model, score_output=OUTPUT, score_kind=kind, temperature=1.0, threshold=threshold)


def published(model: BuiltModel) -> MadeVariant:
    """Return the model as a controller delivers it: in chunks."""
    contents = {file.path: (model.folder / file.path).read_bytes() for file in model.manifest.files}
    files = [file.model_copy(update={"chunks": (chunk_of(contents[file.path]),)}) for file in model.manifest.files]
    manifest = model.manifest.model_copy(update={"files": tuple(files)})
    blobs = {digest_of(content): content for content in (manifest.to_bytes(), *contents.values())}
    return MadeVariant(manifest, manifest.digest(), blobs)


def make_mlp(
    folder: Path,
    *,
    name: str = "digits",
    sizes: Sequence[int] = (64, 16, 10),
    version: int = 1,
    max_batch: int = 32,
    cascade: Cascade | None = None,
    seed: int = 7,
) -> BuiltModel:
    """Return a multi-layer perceptron with ReLU, from `(rows, sizes[0])` to logits `(rows, sizes[-1])`, both FP32."""
    layers = _seeded_layers(sizes, seed)
    nodes = []
    initialisers = []
    current = INPUT
    for number, (weights, bias) in enumerate(layers):
        initialisers += [numpy_helper.from_array(weights, f"w{number}"), numpy_helper.from_array(bias, f"b{number}")]
        result = OUTPUT if number == len(layers) - 1 else f"sum{number}"
        nodes.append(helper.make_node("Gemm", [current, f"w{number}", f"b{number}"], [result]))
        if result != OUTPUT:
            nodes.append(helper.make_node("Relu", [result], [f"relu{number}"]))
        current = f"relu{number}"
    graph = _graph(nodes, initialisers, inputs=sizes[0], outputs=sizes[-1])
    return _publish(folder, graph, name=name, version=version, max_batch=max_batch, cascade=cascade)


def make_echo(
    folder: Path,
    *,
    name: str = "echo",
    version: int = 1,
    max_batch: int = 32,
    cascade: Cascade | None = None,
    operator: str = "Identity",
) -> BuiltModel:
    """Return a model that gives its input `(rows, 4)` FP32 back as its scores, so that a test chooses the answer.

    With another `operator` it gives what that makes of each number: `Log` of a negative one is not a number.
    """
    graph = _graph([helper.make_node(operator, [INPUT], [OUTPUT])], [], inputs=4, outputs=4)
    return _publish(folder, graph, name=name, version=version, max_batch=max_batch, cascade=cascade)


def mlp_scores(inputs: Array, sizes: Sequence[int] = (64, 16, 10), seed: int = 7) -> Array:
    """Return what `make_mlp` computes, by numpy."""
    values = inputs
    for weights, bias in _seeded_layers(sizes, seed):
        scores = values @ weights + bias
        values = np.maximum(scores, 0)
    return scores


def _seeded_layers(sizes: Sequence[int], seed: int) -> list[tuple[Array, Array]]:
    random = np.random.default_rng(seed)
    return [
        (
            (random.standard_normal((wide, narrow)) / np.sqrt(wide)).astype(np.float32),
            (random.standard_normal(narrow) / 10).astype(np.float32),
        )
        for wide, narrow in pairwise(sizes)
    ]


def _graph(
    nodes: Sequence[onnx.NodeProto], initialisers: Sequence[onnx.TensorProto], *, inputs: int, outputs: int
) -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes),
        "model",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["rows", inputs])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["rows", outputs])],
        list(initialisers),
    )


def _publish(
    folder: Path, graph: onnx.GraphProto, *, name: str, version: int, max_batch: int, cascade: Cascade | None
) -> BuiltModel:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    manifest = Manifest(
        model=name,
        version=version,
        variant="original",
        entry="model.onnx",
        files=(File(path="model.onnx", digest=digest_of_file(path), size_bytes=path.stat().st_size),),
        inputs=(_signature(graph.input[0]),),
        outputs=(_signature(graph.output[0]),),
        batching=Batching(max_batch=max_batch),
        cascade=cascade,
        lineage=Lineage(recipe="original"),
    )
    return BuiltModel(manifest, manifest.digest(), folder)


def _signature(value: onnx.ValueInfoProto) -> Signature:
    columns = value.type.tensor_type.shape.dim[1].dim_value
    return Signature(name=value.name, datatype=Datatype.FP32, shape=(-1, columns))
