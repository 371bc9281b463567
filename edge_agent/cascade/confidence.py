"""How sure a model is of its answer: the largest entry of softmax(z / T), for a whole batch at once.

z are the logits or the logarithm of the probabilities, T the temperature fitted at publish. Outputs that carry no
confidence have a flaw instead, and a flaw always escalates:

    empty       no scores at all
    malformed   not numbers, fewer than two classes, a probability outside 0..1, or an output of another shape than the
                manifest says
    not_finite  NaN or infinity among the scores
    tied        the two largest scores are equal

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2. The same formula as the controller's
calibration, which chose the threshold.
"""

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from core.manifest import Cascade, ScoreKind
from core.tensors import Array, TensorSpec

# A dozen calls into numpy cost more than this many scores in Python (measured: 21 us against 4 us for ten).
_FEW_SCORES = 40
# One, and the rounding of half-precision models.
_MAX_PROBABILITY = 1 + 1e-3


class Flaw(StrEnum):
    EMPTY = "empty"
    MALFORMED = "malformed"
    NOT_FINITE = "not_finite"
    TIED = "tied"


class Verdict(NamedTuple):
    """What one row of scores says: a confidence, or why there is none."""

    confidence: float | None
    flaw: Flaw | None = None


MALFORMED = Verdict(None, Flaw.MALFORMED)
Judge = Callable[[Array], Sequence[Verdict]]


def judge_for(cascade: Cascade) -> Judge:
    """Return the judge of a variant's score output."""

    def judge(scores: Array) -> Sequence[Verdict]:
        return judge_scores(scores, kind=cascade.score_kind, temperature=cascade.temperature)

    return judge


def judge_scores(scores: Array, *, kind: ScoreKind, temperature: float) -> Sequence[Verdict]:
    """Judge every row of `scores` (rows, classes); a lone vector counts as one row."""
    if scores.size == 0:
        return [Verdict(None, Flaw.EMPTY)] * max(1, len(scores) if scores.ndim > 1 else 1)
    rows = scores.reshape(-1, scores.shape[-1]) if scores.ndim else scores.reshape(1, 1)
    if rows.dtype.kind not in "fiu" or rows.shape[1] < 2:
        return [Verdict(None, Flaw.MALFORMED)] * len(rows)
    if rows.size <= _FEW_SCORES:
        return [_judge_row(row, kind, temperature) for row in rows.tolist()]
    return _judge_rows(rows.astype(np.float64), kind, temperature)


def weakest(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on several rows together: a flaw if any has one, otherwise the lowest confidence."""
    for verdict in verdicts:
        if verdict.confidence is None:
            return verdict
    return min(verdicts, key=lambda verdict: verdict.confidence or 0.0, default=Verdict(None, Flaw.EMPTY))


def are_shaped(outputs: Sequence[Array], specs: Sequence[TensorSpec], *, rows: int | None) -> bool:
    """Say whether a model's outputs have the shapes of its manifest, where -1 is any size.

    `rows` are those of the request, which come first in every output of a model that batches; None: it does not.
    """
    if len(outputs) != len(specs):
        return False
    for output, spec in zip(outputs, specs, strict=True):
        found, shape = output.shape, spec.shape
        # As it nearly always is, and without a call.
        if shape[:1] == (-1,) and found[:1] == (rows,) and found[1:] == shape[1:]:
            continue
        if not _fits(found, shape) or (rows is not None and found[:1] != (rows,)):
            return False
    return True


def _fits(found: Sequence[int], shape: Sequence[int]) -> bool:
    return len(found) == len(shape) and all(want in (-1, size) for want, size in zip(shape, found, strict=True))


def _judge_row(row: Sequence[float], kind: ScoreKind, temperature: float) -> Verdict:
    """Judge one row without numpy; the same as `_judge_rows`."""
    is_malformed = False
    if not all(map(math.isfinite, row)):
        return Verdict(None, Flaw.NOT_FINITE)
    if kind is ScoreKind.PROBABILITIES:
        is_malformed = min(row) < 0 or max(row) > _MAX_PROBABILITY
        row = [math.log(share) if share > 0 else -math.inf for share in row]
    top = max(row)
    if is_malformed or row.count(top) > 1:
        return Verdict(None, _flaw(True, is_malformed))
    return Verdict(1.0 / sum([math.exp((logit - top) / temperature) for logit in row]))


def _judge_rows(rows: Array, kind: ScoreKind, temperature: float) -> Sequence[Verdict]:
    if kind is ScoreKind.PROBABILITIES:
        is_malformed: Array = np.any((rows < 0) | (rows > _MAX_PROBABILITY), axis=1)
        # A probability of zero is a logit of minus infinity, which softmax takes as it is.
        with np.errstate(divide="ignore", invalid="ignore"):
            logits = np.log(rows)
    else:
        is_malformed = np.zeros(len(rows), dtype=bool)
        logits = rows
    is_finite: Array = np.all(np.isfinite(rows), axis=1)
    top = np.partition(logits, -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        shares = np.exp((logits - top[:, 1:]) / temperature)
        confidences = 1.0 / shares.sum(axis=1)
    is_tied = np.equal(top[:, 0], top[:, 1])
    flags = zip(is_finite.tolist(), is_malformed.tolist(), is_tied.tolist(), strict=True)
    return [
        Verdict(None, _flaw(finite, malformed)) if not finite or malformed or tied else Verdict(confidence)
        for confidence, (finite, malformed, tied) in zip(confidences.tolist(), flags, strict=True)
    ]


def _flaw(is_finite: bool, is_malformed: bool) -> Flaw:
    if not is_finite:
        return Flaw.NOT_FINITE
    return Flaw.MALFORMED if is_malformed else Flaw.TIED
