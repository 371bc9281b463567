"""A model of any size whose bytes do not compress, of which a next version shares as many tensors as a test likes."""

import itertools

import numpy as np
from onnx import TensorProto, helper, numpy_helper

# 512 x 512 float32: one chunk of 1 MiB.
WIDTH = 512


def bulky_onnx(*, tensors: int, kept: int, seed: int) -> bytes:
    """Return `tensors` square layers of random weights; the first `kept` of them are the same for every seed."""
    random = {True: np.random.default_rng(0), False: np.random.default_rng(seed)}
    weights = [
        numpy_helper.from_array((random[kth < kept].standard_normal((WIDTH, WIDTH)) / WIDTH).astype("f4"), f"w{kth}")
        for kth in range(tensors)
    ]
    names = ["x", *(f"h{kth}" for kth in range(tensors - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [before, f"w{kth}"], [after])
        for kth, (before, after) in enumerate(itertools.pairwise(names))
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "bulky", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
