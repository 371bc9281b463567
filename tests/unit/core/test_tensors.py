"""A specification says what fits: the datatype, and every dimension that is not variable."""

import numpy as np
import pytest

from core.errors import InvalidTensor
from core.tensors import NUMPY_DTYPE, Datatype, Tensor, TensorSpec

SPEC = TensorSpec("x", Datatype.FP32, (-1, 64))


def tensor_of(shape: tuple[int, ...], datatype: Datatype = Datatype.FP32) -> Tensor:
    return Tensor("x", datatype, np.zeros(shape, NUMPY_DTYPE[datatype]))


def test_every_datatype_has_a_little_endian_array_type() -> None:
    assert set(NUMPY_DTYPE) == set(Datatype)
    assert all(dtype.newbyteorder("<") == dtype for dtype in NUMPY_DTYPE.values())


@pytest.mark.parametrize("shape", [(1, 64), (1000, 64), (0, 64)])
def test_a_variable_dimension_takes_any_length(shape: tuple[int, ...]) -> None:
    SPEC.require(tensor_of(shape))


@pytest.mark.parametrize("shape", [(64,), (1, 63), (1, 64, 1), ()])
def test_another_shape_is_refused_naming_both(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTensor, match=r"'x': expected shape \[-1, 64\], got \["):
        SPEC.require(tensor_of(shape))


def test_another_datatype_is_refused_naming_both() -> None:
    with pytest.raises(InvalidTensor, match="expected datatype FP32, got FP64"):
        SPEC.require(tensor_of((1, 64), Datatype.FP64))
