"""Sessions of ONNX Runtime for checking and measuring. Runs in the child process.

`ORT_DISABLE_TELEMETRY` must be set before the first import of onnxruntime; whoever starts the child sets it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime

from controller.compression.model import ModelBundle
from core.errors import InvalidModel
from core.tensors import Array

# ONNX Runtime's severity FATAL: what is wrong comes back as an exception.
_ONLY_FATAL = 4

NUMPY_DTYPE = {
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(string)": np.object_,
}


class Argument(Protocol):
    """An input or output as the runtime describes it; a variable dimension is a name or None."""

    name: str
    type: str
    shape: list[int | str | None]


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used here."""

    def get_inputs(self) -> list[Argument]: ...
    def get_outputs(self) -> list[Argument]: ...
    def run(self, outputs: list[str] | None, inputs: Mapping[str, Array]) -> list[Any]: ...


def open_session(bundle: ModelBundle) -> Session:
    """Load the model for one thread of a CPU.

    Raises:
        InvalidModel: ONNX Runtime refuses it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _ONLY_FATAL
    try:
        session: Session = onnxruntime.InferenceSession(
            str(bundle.entry_path), options, providers=["CPUExecutionProvider"]
        )
    # The runtime's exceptions share no base class of their own.
    except Exception as error:
        raise InvalidModel(f"model: ONNX Runtime does not load it: {error}") from error
    return session


def run(session: Session, inputs: Mapping[str, Array]) -> list[Array]:
    """Run the model once and return every output.

    Raises:
        InvalidModel: it fails on these inputs.
    """
    try:
        return session.run(None, inputs)
    except Exception as error:
        raise InvalidModel(f"model: does not run: {error}") from error
