"""Decide whether an ONNX file is one that we accept, and read what it takes and gives. Runs in the child process.

From cheap to dear, so that little is done with a file that is refused anyway: parse, bounds of versions, what the graph
may contain, where its external data lies, ONNX's own checker, and at last a session of ONNX Runtime.

Refused on purpose: operators outside ONNX, ONNX-ML and ONNX Runtime's own; model-local functions and training parts,
which hide operators from the checks; EPContext, which makes the runtime open a file of its own choice; and external
data outside the bundle.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

import onnx
import onnx.checker
import onnx.defs
from pydantic import ValidationError

from controller.compression.model import Inspected, ModelBundle
from controller.compression.session import open_session
from core.errors import InvalidModel
from core.manifest import Signature
from core.tensors import DATATYPE_OF_ONNX, TensorSpec

# ONNX Runtime promises to run operator sets from 7 on; IR 3 is what came with them.
MIN_IR_VERSION = 3
MIN_OPSET = 7
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
_REFUSED_OPERATORS = frozenset({"EPContext"})
# As many as a manifest may hold.
_MAX_SIGNATURES = 64


def inspect(bundle: ModelBundle) -> Inspected:
    """Check the model and return its signature.

    Raises:
        InvalidModel: it is refused, with the reason.
    """
    model = parse(bundle)
    _check_versions(model)
    _check_contents(model)
    external = {_location(tensor, bundle) for tensor in tensors_of(model.graph)}
    try:
        onnx.checker.check_model(str(bundle.entry_path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise InvalidModel(f"model: the ONNX checker refuses it: {error}") from error
    return replace(_signatures(bundle), external_files=frozenset(path for path in external if path is not None))


def parse(bundle: ModelBundle) -> onnx.ModelProto:
    """Return the model without its external data.

    Raises:
        InvalidModel: it is not an ONNX file.
    """
    # ONNX Runtime and onnx.load choose the format by this ending; only one is checked here.
    if not bundle.entry.endswith(".onnx"):
        raise InvalidModel(f"model: expected a file name that ends with .onnx, got {bundle.entry!r}")
    try:
        model = onnx.load_model_from_string(bundle.entry_path.read_bytes())
    # The parser's error class depends on the implementation of protobuf.
    except Exception as error:
        raise InvalidModel(f"model: expected an ONNX file, got something else or a part of one: {error}") from error
    if not model.ir_version or not model.graph.node:
        raise InvalidModel("model: expected an ONNX file with a graph, got something else")
    return model


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, those of nested graphs (If, Loop, Scan) included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for nested in (attribute.g, *attribute.graphs):
                yield from nodes_of(nested)


def tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant tensor, wherever it hides."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for nested in (attribute.g, *attribute.graphs):
                yield from tensors_of(nested)


def _check_versions(model: onnx.ModelProto) -> None:
    if not MIN_IR_VERSION <= model.ir_version <= onnx.IR_VERSION:
        raise InvalidModel(f"model: expected IR {MIN_IR_VERSION} to {onnx.IR_VERSION}, got {model.ir_version}")
    opset = max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=None)
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not MIN_OPSET <= opset <= newest:
        raise InvalidModel(f"model: expected opset {MIN_OPSET} to {newest}, got {opset}; export it again")


def _check_contents(model: onnx.ModelProto) -> None:
    if model.functions:
        raise InvalidModel("model: expected no model-local functions; inline them with onnx.inliner")
    if model.training_info:
        raise InvalidModel("model: expected no training parts; export it for inference")
    for node in nodes_of(model.graph):
        if node.domain not in DOMAINS or node.op_type in _REFUSED_OPERATORS:
            raise InvalidModel(
                f"model: operator {node.domain[:80]}:{node.op_type[:80]} is not accepted; "
                "accepted are those of ai.onnx, ai.onnx.ml and com.microsoft without EPContext"
            )


def _location(tensor: onnx.TensorProto, bundle: ModelBundle) -> str | None:
    """Return the file of the bundle in which the tensor lies; None: in the model itself."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    fields = {entry.key: entry.value for entry in tensor.external_data}
    # Locations are relative to the entry's folder; the extra files' paths were checked when they were named.
    path = str(PurePosixPath(bundle.entry).parent / fields.get("location", ""))
    if path not in bundle.extra_files:
        raise InvalidModel(
            f"model: tensor {tensor.name[:80]!r} lies in {path[:160]!r}, which is not among the extra files; "
            "upload it and name it by this relative path"
        )
    size_bytes = (bundle.folder / path).stat().st_size
    offset, length = (_whole_number(fields.get(key, "0")) for key in ("offset", "length"))
    if offset + length > size_bytes:
        raise InvalidModel(
            f"model: tensor {tensor.name[:80]!r} ends at byte {offset + length} of {path!r}, which has {size_bytes}"
        )
    return path


def _whole_number(text: str) -> int:
    # Nineteen digits hold every 63-bit number; longer ones only cost time.
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise InvalidModel(f"model: expected external data at a whole number of bytes, got {text[:80]!r}")
    return int(text)


def _signatures(bundle: ModelBundle) -> Inspected:
    session = open_session(bundle)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    for kind, arguments in (("inputs", inputs), ("outputs", outputs)):
        if not 1 <= len(arguments) <= _MAX_SIGNATURES:
            raise InvalidModel(f"model: expected 1 to {_MAX_SIGNATURES} {kind}, got {len(arguments)}")
    return Inspected(
        tuple(_spec(argument.name, argument.type, argument.shape) for argument in inputs),
        tuple(_spec(argument.name, argument.type, argument.shape) for argument in outputs),
    )


def _spec(name: str, type_name: str, shape: list[int | str | None]) -> TensorSpec:
    if type_name not in DATATYPE_OF_ONNX:
        raise InvalidModel(
            f"model: {name[:80]!r}: expected a tensor, got {type_name[:80]}; skl2onnx needs the option zipmap False"
        )
    dimensions = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in shape)
    try:
        return Signature(name=name, datatype=DATATYPE_OF_ONNX[type_name], shape=dimensions).spec()
    except ValidationError as error:
        raise InvalidModel(f"model: {name[:80]!r} of shape {list(dimensions)[:8]} does not fit a manifest") from error
