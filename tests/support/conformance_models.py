"""The models that conformance clients ask, as ONNX files; any server that registers them can be put to the same checks.

everything   one input `in_<DATATYPE>` (n, 3) per datatype that ONNX Runtime takes, each answered as `out_<DATATYPE>`
arithmetic   a, b (n, 4) float32 → sum, difference, product
"""

from typing import Any

from onnx import TensorProto, helper

from core.tensors import Datatype, TensorSpec

EVERYTHING = "everything"
ARITHMETIC = "arithmetic"
# ONNX Runtime takes bfloat16, but numpy has no such type to hand it over in.
ONNX_TYPES = {
    Datatype.BOOL: TensorProto.BOOL,
    Datatype.UINT8: TensorProto.UINT8,
    Datatype.UINT16: TensorProto.UINT16,
    Datatype.UINT32: TensorProto.UINT32,
    Datatype.UINT64: TensorProto.UINT64,
    Datatype.INT8: TensorProto.INT8,
    Datatype.INT16: TensorProto.INT16,
    Datatype.INT32: TensorProto.INT32,
    Datatype.INT64: TensorProto.INT64,
    Datatype.FP16: TensorProto.FLOAT16,
    Datatype.FP32: TensorProto.FLOAT,
    Datatype.FP64: TensorProto.DOUBLE,
    Datatype.BYTES: TensorProto.STRING,
}


def everything() -> bytes:
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in ONNX_TYPES]
    return _serialised(nodes, inputs=_tensors("in", columns=3), outputs=_tensors("out", columns=3))


def arithmetic() -> bytes:
    nodes = [
        helper.make_node(operator, ["a", "b"], [name])
        for operator, name in (("Add", "sum"), ("Sub", "difference"), ("Mul", "product"))
    ]
    inputs = [_tensor(name, TensorProto.FLOAT, columns=4) for name in ("a", "b")]
    outputs = [_tensor(name, TensorProto.FLOAT, columns=4) for name in ("sum", "difference", "product")]
    return _serialised(nodes, inputs=inputs, outputs=outputs)


def everything_specs() -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of `everything`."""
    inputs = tuple(TensorSpec(f"in_{name}", name, (-1, 3)) for name in ONNX_TYPES)
    return inputs, tuple(TensorSpec(f"out_{name}", name, (-1, 3)) for name in ONNX_TYPES)


def arithmetic_specs() -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of `arithmetic`."""
    inputs = tuple(TensorSpec(name, Datatype.FP32, (-1, 4)) for name in ("a", "b"))
    return inputs, tuple(TensorSpec(name, Datatype.FP32, (-1, 4)) for name in ("sum", "difference", "product"))


def _tensors(prefix: str, *, columns: int) -> list[Any]:
    return [_tensor(f"{prefix}_{name}", onnx_type, columns=columns) for name, onnx_type in ONNX_TYPES.items()]


def _tensor(name: str, onnx_type: int, *, columns: int) -> Any:
    return helper.make_tensor_value_info(name, onnx_type, ["n", columns])


def _serialised(nodes: list[Any], *, inputs: list[Any], outputs: list[Any]) -> bytes:
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content
