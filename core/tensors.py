"""Tensors of the Open Inference Protocol as numpy arrays, and the specifications they must fit.

Datatypes and their numpy storage:

    BOOL bool · UINT8/16/32/64 · INT8/16/32/64 · FP16 float16 · FP32 float32 · FP64 float64
    BF16 as uint16 (the raw bits: numpy has no such type) · BYTES as object, every element a `bytes`
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import InvalidTensor

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Datatype(StrEnum):
    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    BF16 = "BF16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"


NUMPY_DTYPE: dict[Datatype, np.dtype[Any]] = {
    Datatype.BOOL: np.dtype(np.bool_),
    Datatype.UINT8: np.dtype("<u1"),
    Datatype.UINT16: np.dtype("<u2"),
    Datatype.UINT32: np.dtype("<u4"),
    Datatype.UINT64: np.dtype("<u8"),
    Datatype.INT8: np.dtype("<i1"),
    Datatype.INT16: np.dtype("<i2"),
    Datatype.INT32: np.dtype("<i4"),
    Datatype.INT64: np.dtype("<i8"),
    Datatype.FP16: np.dtype("<f2"),
    Datatype.BF16: np.dtype("<u2"),
    Datatype.FP32: np.dtype("<f4"),
    Datatype.FP64: np.dtype("<f8"),
    Datatype.BYTES: np.dtype(object),
}

# ONNX Runtime's names of the element types. It also knows bfloat16, which cannot be handed over in a numpy array.
DATATYPE_OF_ONNX: dict[str, Datatype] = {
    "tensor(bool)": Datatype.BOOL,
    "tensor(uint8)": Datatype.UINT8,
    "tensor(uint16)": Datatype.UINT16,
    "tensor(uint32)": Datatype.UINT32,
    "tensor(uint64)": Datatype.UINT64,
    "tensor(int8)": Datatype.INT8,
    "tensor(int16)": Datatype.INT16,
    "tensor(int32)": Datatype.INT32,
    "tensor(int64)": Datatype.INT64,
    "tensor(float16)": Datatype.FP16,
    "tensor(float)": Datatype.FP32,
    "tensor(double)": Datatype.FP64,
    "tensor(string)": Datatype.BYTES,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives under one name; -1 stands for a variable dimension."""

    name: str
    datatype: Datatype
    shape: Shape

    def require(self, tensor: "Tensor") -> None:
        """Raise InvalidTensor unless `tensor` has this datatype and a shape that fits."""
        if tensor.datatype is not self.datatype:
            raise InvalidTensor(f"input {self.name!r}: expected datatype {self.datatype}, got {tensor.datatype}")
        got = tensor.array.shape
        fits = len(got) == len(self.shape) and all(
            want in (-1, have) for want, have in zip(self.shape, got, strict=True)
        )
        if not fits:
            raise InvalidTensor(f"input {self.name!r}: expected shape {list(self.shape)}, got {list(got)}")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array; `array.dtype` is NUMPY_DTYPE[datatype] and `array.shape` its shape."""

    name: str
    datatype: Datatype
    array: Array
