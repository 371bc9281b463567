"""Golden inputs: a few samples and what this variant answered to them, for agents to ask before they let it serve.

Runs in the child process. Samples are the first of the data set, where there is one that fits; otherwise seeded noise
that any model takes: floats around zero, indices of zero and one. The file is an .npz as `core.manifest.SelfTest`
describes it, and its bytes depend on nothing but the arrays.

How far another machine may be off is measured in the largest number that the model answered. Other processors add up in
another order, which moves float32 by parts in a million. Quantised ones differ more: their activations are rounded to
one of 256 steps, a sum that falls on the other side of a step moves everything behind it, and x86 without VNNI
saturates where VNNI and ARM do not. The int8 bounds are loose for that reason; they still catch a model that answers
something else, which is what a self-test is for.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx

from controller.compression.datasets import load_samples
from controller.compression.inspect import nodes_of, parse, tensors_of
from controller.compression.model import Dataset, Golden, GoldenOrder, ModelBundle
from controller.compression.session import NUMPY_DTYPE, Argument, Session, run
from core.errors import InvalidModel
from core.tensors import Array

MAX_SAMPLES = 8
# Chosen: with every variant it travels to every agent, so it is small beside all but the tiniest models.
MAX_BYTES = 256 << 10
_VARIABLE_SIZE = 4
_SEED = 7
# (rtol, atol as a share of the largest number).
_FLOAT32, _FLOAT16, _INT8 = (1e-3, 1e-4), (1e-2, 1e-2), (0.1, 0.1)
_Run = Mapping[str, Array]


def write_golden(session: Session, bundle: ModelBundle, order: GoldenOrder) -> Golden:
    """Write the file that `order` asks for and return how it is to be judged.

    Raises:
        InvalidModel: the model runs on none of the inputs.
    """
    inputs, outputs = _first_that_runs(session, order)
    kept = _judged(outputs)
    arrays = {f"input.{name}": array for name, array in inputs.items()}
    arrays |= {f"output.{name}": array for name, array in kept.items()}
    order.path.write_bytes(_npz(arrays))
    rtol, share = _precision(bundle)
    samples = len(next(iter(inputs.values())))
    return Golden(samples, rtol, share * max(1e-6, *(_largest(array) for array in kept.values())))


def _first_that_runs(session: Session, order: GoldenOrder) -> tuple[_Run, _Run]:
    *rest, last = _candidates(session, order)
    for samples in rest:
        try:
            return samples, _answers(session, samples, shares_runs=order.max_batch > 1)
        except InvalidModel:
            # Noise may lie outside of what a model takes; zeros, which are last, measured its latency.
            continue
    return last, _answers(session, last, shares_runs=order.max_batch > 1)


def _candidates(session: Session, order: GoldenOrder) -> list[_Run]:
    arguments, random = session.get_inputs(), np.random.default_rng(_SEED)
    found = [] if order.dataset is None else _of_data(arguments, order.dataset, order)
    for variable_size, is_noise in ((_VARIABLE_SIZE, True), (1, True), (1, False)):
        shapes = [_shape(argument, variable_size, shares_runs=order.max_batch > 1) for argument in arguments]
        count = _count(
            sum(_size_bytes(shape, argument) for shape, argument in zip(shapes, arguments, strict=True)), order
        )
        found.append(
            {
                argument.name: _noise(random if is_noise else None, (count, *shape), argument)
                for shape, argument in zip(shapes, arguments, strict=True)
            }
        )
    return found


def _of_data(arguments: Sequence[Argument], dataset: Dataset, order: GoldenOrder) -> list[_Run]:
    """Return the first samples of the data set; nothing when it does not fit the model."""
    inputs = load_samples(dataset.path).inputs
    if len(arguments) != 1 or inputs.dtype != NUMPY_DTYPE.get(arguments[0].type):
        return []
    if order.max_batch > 1:
        return [{arguments[0].name: inputs[: _count(inputs[0].nbytes, order)]}]
    size = arguments[0].shape[0] if isinstance(arguments[0].shape[0], int) else 1
    count = min(_count(inputs[:size].nbytes, order), len(inputs) // size)
    parts = inputs[: count * size].reshape(count, size, *inputs.shape[1:])
    return [{arguments[0].name: parts}] if count else []


def _count(sample_bytes: int, order: GoldenOrder) -> int:
    most = min(MAX_SAMPLES, order.max_batch) if order.max_batch > 1 else MAX_SAMPLES
    return max(1, min(most, MAX_BYTES // max(1, sample_bytes)))


def _shape(argument: Argument, variable_size: int, *, shares_runs: bool) -> list[int]:
    """Return the shape of one sample: a row where runs are shared, else all that the model takes at a time."""
    shape = [size if isinstance(size, int) else variable_size for size in argument.shape]
    if shares_runs:
        return shape[1:]
    if shape and not isinstance(argument.shape[0], int):
        shape[0] = 1
    return shape


def _size_bytes(shape: Sequence[int], argument: Argument) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(NUMPY_DTYPE[argument.type]).itemsize


def _noise(random: np.random.Generator | None, shape: Sequence[int], argument: Argument) -> Array:
    dtype = np.dtype(NUMPY_DTYPE[argument.type])
    if dtype.kind == "O":
        return np.full(shape, b"", dtype="S1")
    if random is None:
        return np.zeros(shape, dtype)
    # Whole numbers may be indices of a table or marks of a mask, which zero and one are in any.
    drawn = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
    return drawn.astype(dtype)


def _answers(session: Session, samples: _Run, *, shares_runs: bool) -> _Run:
    names = [output.name for output in session.get_outputs()]
    runs = [samples] if shares_runs else list(_one_by_one(samples))
    answers = [run(session, {name: _given(array) for name, array in inputs.items()}) for inputs in runs]
    if shares_runs:
        return dict(zip(names, map(_kept_array, answers[0]), strict=True))
    return {name: np.stack([_kept_array(answer[at]) for answer in answers]) for at, name in enumerate(names)}


def _one_by_one(samples: _Run) -> Iterator[_Run]:
    for sample in range(len(next(iter(samples.values())))):
        yield {name: array[sample] for name, array in samples.items()}


def _given(array: Array) -> Array:
    return array.astype(str).astype(object) if array.dtype.kind == "S" else array


def _kept_array(array: Array) -> Array:
    """Return what can be stored without pickles: text as bytes of one length."""
    if not isinstance(array, np.ndarray):
        raise InvalidModel(f"model: expected tensors as outputs, got {type(array).__name__}")
    if array.dtype != object:
        return array
    encoded = np.array([str(element).encode() for element in array.ravel()], dtype=bytes)
    return encoded.reshape(array.shape)


def _judged(outputs: _Run) -> _Run:
    """Return the outputs with fractions, where there are any: a label between two that tie falls either way."""
    floats = {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
    return floats or outputs


def _largest(array: Array) -> float:
    if array.dtype.kind not in "fiu" or not array.size:
        return 0.0
    finite = np.where(np.isfinite(array), array, 0)
    return float(np.abs(finite.astype(np.float64)).max())


def _precision(bundle: ModelBundle) -> tuple[float, float]:
    model = parse(bundle)
    operators = {node.op_type for node in nodes_of(model.graph)}
    if any("Quant" in operator or "Integer" in operator or operator.startswith("QLinear") for operator in operators):
        return _INT8
    types = {tensor.data_type for tensor in tensors_of(model.graph)}
    return _FLOAT16 if types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16} else _FLOAT32


def _npz(arrays: Mapping[str, Array]) -> bytes:
    """Return the arrays as numpy.savez writes them, without the time of day."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(arrays[name]), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), member.getvalue())
    return content.getvalue()
