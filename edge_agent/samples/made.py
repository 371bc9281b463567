"""A hard example made into the bytes that are kept. For the disk's thread: it computes as long as a request runs."""

from datetime import datetime

import numpy as np

from core.manifest import Cascade
from core.sample_file import SampleTensors, SampleView, encode_sample
from core.tensors import Array, Datatype, Tensor
from edge_agent.hard_examples import HardExample


def label_of(scores: Array) -> int | None:
    """Return the class that `scores` (rows, classes) predict in the row that is least sure; None: they name none."""
    if scores.size == 0 or scores.ndim == 0 or scores.dtype.kind not in "fiu" or scores.shape[-1] < 2:
        return None
    rows = scores.reshape(-1, scores.shape[-1])
    if not np.isfinite(rows).all():
        return None
    return int(rows[_least_sure(rows)].argmax())


def edge_label(example: HardExample, cascade: Cascade) -> int | None:
    return label_of(example.outputs[_position(example, cascade)])


def reason_of(example: HardExample) -> str:
    """Return what was wrong with the edge's answer, else why it was no better."""
    return example.reason.value if example.verdict.flaw is None else example.verdict.flaw.value


def made_sample(example: HardExample, *, label: int | None, taken_at: datetime) -> tuple[SampleView, bytes]:
    """Return the sample of an example: what it is, and its file."""
    manifest = example.model.manifest
    assert manifest.cascade is not None
    view = SampleView(
        taken_at=taken_at,
        model=manifest.model,
        version=example.model.version,
        variant=manifest.variant,
        manifest=example.model.digest,
        reason=reason_of(example),
        tier=example.tier.value,
        privacy=example.privacy.value,
        confidence=example.verdict.confidence,
        flaw=None if example.verdict.flaw is None else example.verdict.flaw.value,
        label=label,
        heavy_label=_heavy_label(example, manifest.cascade),
        heavy_model=None if example.heavy is None else example.heavy.model_name,
        tensors=(),
    )
    edge = [
        Tensor(spec.name, spec.datatype, array)
        for spec, array in zip(example.model.outputs, example.outputs, strict=True)
    ]
    heavy = () if example.heavy is None else example.heavy.outputs
    return view, encode_sample(view, SampleTensors(example.request.inputs, edge, heavy))


def size_of(example: HardExample) -> int:
    """Return about how many bytes of memory an example holds."""
    heavy = () if example.heavy is None else example.heavy.outputs
    tensors = sum(_tensor_bytes(tensor) for tensor in (*example.request.inputs, *heavy))
    return tensors + sum(array.nbytes for array in example.outputs)


def _tensor_bytes(tensor: Tensor) -> int:
    if tensor.datatype is Datatype.BYTES:
        return sum(len(element) for element in tensor.array.flat)
    return tensor.array.nbytes


def _heavy_label(example: HardExample, cascade: Cascade) -> int | None:
    """Return the heavy tier's class for the row in which the edge was least sure, as `label` is."""
    if example.heavy is None:
        return None
    scores = [tensor.array for tensor in example.heavy.outputs if tensor.name == cascade.score_output]
    if not scores or scores[0].ndim == 0 or scores[0].dtype.kind not in "fiu" or scores[0].shape[-1] < 2:
        return None
    rows = scores[0].reshape(-1, scores[0].shape[-1])
    edge = example.outputs[_position(example, cascade)]
    row = _least_sure(edge.reshape(-1, edge.shape[-1])) if len(rows) > 1 and edge.ndim and edge.size else 0
    if row >= len(rows) or not np.isfinite(rows[row]).all():
        return None
    return int(rows[row].argmax())


def _position(example: HardExample, cascade: Cascade) -> int:
    return [spec.name for spec in example.model.outputs].index(cascade.score_output)


def _least_sure(rows: Array) -> int:
    """Return the row whose largest score stands out least, for logits and probabilities alike."""
    if len(rows) == 1:
        return 0
    top = np.partition(rows.astype(np.float64), -2, axis=1)[:, -2:]
    return int((top[:, 1] - top[:, 0]).argmin())
