"""A request fits a model by the names, datatypes and shapes of its manifest, or is refused naming both sides."""

import numpy as np
import pytest

from core.errors import InvalidTensor
from core.open_inference.messages import InferRequest, RequestedOutput
from core.open_inference.signature import ModelSignature
from core.tensors import Datatype, Tensor, TensorSpec

SIGNATURE = ModelSignature(
    {"a": TensorSpec("a", Datatype.FP32, (-1, 2)), "b": TensorSpec("b", Datatype.INT64, (1,))},
    {"y": TensorSpec("y", Datatype.FP32, (-1,)), "z": TensorSpec("z", Datatype.FP32, (-1,))},
)
A = Tensor("a", Datatype.FP32, np.zeros((3, 2), np.float32))
B = Tensor("b", Datatype.INT64, np.zeros(1, np.int64))


def request_with(*inputs: Tensor, outputs: tuple[str, ...] = ()) -> InferRequest:
    return InferRequest("m", inputs, outputs=tuple(RequestedOutput(name) for name in outputs))


def test_inputs_fit_in_any_order() -> None:
    SIGNATURE.require(request_with(A, B))
    SIGNATURE.require(request_with(B, A, outputs=("z",)))


@pytest.mark.parametrize("inputs", [(), (A,), (A, A), (A, B, Tensor("c", Datatype.FP32, A.array)), (A, B, B)])
def test_missing_doubled_and_surplus_inputs_are_refused(inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(InvalidTensor, match=r"expected the inputs \['a', 'b'\], each once"):
        SIGNATURE.require(request_with(*inputs))


def test_an_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidTensor, match="'b': expected datatype INT64, got FP32"):
        SIGNATURE.require(request_with(A, Tensor("b", Datatype.FP32, np.zeros(1, np.float32))))


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(InvalidTensor, match="expected outputs out of"):
        SIGNATURE.require(request_with(A, B, outputs=("y", "w")))


def test_outputs_come_in_the_order_asked_for_and_all_without_one() -> None:
    assert SIGNATURE.wanted(request_with(A, B, outputs=("z", "y"))) == ("z", "y")
    assert SIGNATURE.wanted(request_with(A, B)) == ("y", "z")
