"""One model in ONNX Runtime: opened from its folder, checked against its manifest, warmed up and measured.

Runs on the CPU with one thread inside an operator by default: the agent's models are small, and a second thread slows
the tiny ones down (measured: 5.1k instead of 8.2k runs/s). More of them are one pool for all models of the process: a
pool per model brought no gain and a thread per model, and its threads kept a core busy for 14 ms after every run of
0.5 ms (measured, ADR 26). `run` releases the interpreter lock while it computes.
"""

import functools
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InternalError, InvalidModel, InvalidTensor
from core.manifest import Manifest, Signature
from core.tensors import DATATYPE_OF_ONNX, NUMPY_DTYPE, Array, Datatype

# Before its first import, or ONNX Runtime starts a telemetry thread and writes to the user's cache folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

_log = logging.getLogger(__name__)

# They have no common base below Exception.
_ORT_ERRORS = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
# The first run allocates; the fastest of the next few is what the model costs on an otherwise idle core.
_WARM_UP_RUNS = 5


class RunTime(NamedTuple):
    """Measured seconds of one run with a single row and with a full batch."""

    single_s: float
    full_s: float


class OnnxModel:
    """A session that is ready to run; `close` frees its memory, nothing may run then."""

    def __init__(self, manifest: Manifest, folder: Path, *, intra_op_threads: int = 1) -> None:
        self.manifest = manifest
        self._session = _open(folder / manifest.entry, intra_op_threads)
        try:
            _check_signature("input", manifest.inputs, self._session.get_inputs())
            _check_signature("output", manifest.outputs, self._session.get_outputs())
            _check_batching(manifest)
        except InvalidModel as error:
            raise InvalidModel(f"{manifest.entry}: {error}") from None
        self._input_names = [signature.name for signature in manifest.inputs]
        self._output_names = [signature.name for signature in manifest.outputs]
        self._has_text = Datatype.BYTES in {signature.datatype for signature in manifest.inputs + manifest.outputs}

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Return the outputs for `inputs`, both in the manifest's order.

        Raises:
            InvalidTensor: ONNX Runtime refuses the inputs.
            InternalError: it fails on them.
        """
        if self._has_text:
            inputs = [_decoded(array) for array in inputs]
        try:
            outputs: list[Array] = self._session.run(
                self._output_names, dict(zip(self._input_names, inputs, strict=True))
            )
        except ort_state.InvalidArgument as error:
            raise InvalidTensor(f"model {self.manifest.model}: {str(error)[:300]}") from error
        except _ORT_ERRORS as error:
            raise InternalError(f"model {self.manifest.model}: the run failed: {str(error)[:300]}") from error
        return [_encoded(array) for array in outputs] if self._has_text else outputs

    def close(self) -> None:
        """Let the session go; nothing may run with it any more."""
        self._session = None

    def warm_up(self, *, max_batch: int) -> RunTime:
        """Run on synthetic inputs and return how long it takes."""
        single_s = self._measure(rows=1)
        return RunTime(single_s, self._measure(rows=max_batch) if max_batch > 1 else single_s)

    def _measure(self, *, rows: int) -> float:
        inputs = [_synthetic(signature, rows) for signature in self.manifest.inputs]
        self.run(inputs)
        times_s = []
        for _ in range(_WARM_UP_RUNS):
            started_s = time.perf_counter()
            self.run(inputs)
            times_s.append(time.perf_counter() - started_s)
        return min(times_s)


def _open(path: Path, intra_op_threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    if intra_op_threads > 1:
        _share_pool(intra_op_threads)
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Errors come back as exceptions; what is below them would only fill the log.
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise InvalidModel(f"{path.name}: ONNX Runtime does not load it: {str(error)[:300]}") from error


@functools.cache
def _share_pool(threads: int) -> None:
    """Size the pool that all models of this process share; it is made with the first of them and stays as it is."""
    try:
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
    except ort_state.Fail:
        _log.warning("the models' thread pool keeps its size", extra={"asked": threads})


def _check_signature(kind: str, wanted: Sequence[Signature], found: Sequence[Any]) -> None:
    have = {node.name: DATATYPE_OF_ONNX.get(node.type, node.type) for node in found}
    for signature in wanted:
        if have.get(signature.name) != signature.datatype:
            got = have.get(signature.name, f"only {sorted(have)}")
            raise InvalidModel(f"{kind} {signature.name!r}: the manifest says {signature.datatype}, the file has {got}")
    if kind == "input" and len(have) != len(wanted):
        raise InvalidModel(f"the manifest names {len(wanted)} inputs, the file has {sorted(have)}")


def _check_batching(manifest: Manifest) -> None:
    if manifest.batching.max_batch == 1:
        return
    for signature in manifest.inputs:
        if not signature.shape or signature.shape[0] != -1:
            raise InvalidModel(
                f"input {signature.name!r}: a batch of {manifest.batching.max_batch} needs a variable first dimension, "
                f"got shape {list(signature.shape)}"
            )


def _synthetic(signature: Signature, rows: int) -> Array:
    shape = [1 if size == -1 else size for size in signature.shape]
    if rows > 1:
        shape[0] = rows
    if signature.datatype is Datatype.BYTES:
        return np.full(shape, b"", dtype=object)
    # Zero is valid for an index as well as for a measurement.
    return np.zeros(shape, dtype=NUMPY_DTYPE[signature.datatype])


def _decoded(array: Array) -> Array:
    """ONNX Runtime takes text as str, the protocol carries bytes."""
    if array.dtype != object:
        return array
    try:
        texts = [element.decode() for element in array.ravel()]
    except UnicodeDecodeError as error:
        raise InvalidTensor("BYTES: expected UTF-8 text, which is what the model takes") from error
    decoded = np.empty(array.shape, dtype=object)
    decoded.ravel()[:] = texts
    return decoded


def _encoded(array: Array) -> Array:
    if array.dtype != object:
        return array
    encoded = np.empty(array.shape, dtype=object)
    encoded.ravel()[:] = [str(element).encode() for element in array.ravel()]
    return encoded
