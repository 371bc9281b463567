"""Temperature and threshold of a cascade, fitted on labelled scores. Pure: arrays in, numbers out.

Temperature scaling (Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks", section 4.2): one
T > 0 for all classes, the confidence of a row is max softmax(z / T), and T minimises the negative log-likelihood of the
labels. z are the logits or the logarithm of the probabilities. The likelihood is convex in 1 / T, so it has one minimum
along log T, which a golden-section search finds.

The threshold is the smallest one whose kept rows (confidence at or above it) have a share of wrong answers of at most
`max_error_ratio`. Between two neighbouring confidences every threshold keeps the same rows; the middle is taken, so
that rounding on another machine moves no row across. It says nothing about rows outside the data it was fitted on.

A row without a usable confidence is never kept, exactly as on the edge: scores that are not finite, probabilities
outside 0..1, and ties for the first place.
"""

from collections.abc import Callable
from math import exp, log, sqrt

import numpy as np

from controller.compression.model import CascadeFit
from core.errors import InvalidRequest
from core.manifest import ScoreKind
from core.tensors import Array

# Where T is looked for; measured models lie within 0.7 .. 1.6. Without a bound a model that makes no mistake on the
# data would get T = 0 and call every answer certain.
MIN_TEMPERATURE = 0.25
MAX_TEMPERATURE = 10.0
# Nothing satisfies the error ratio: everything escalates, save what softmax rounds to one.
ESCALATE_ALL = 1.0
# Slack of a probability above one, from summing in single precision.
_PROBABILITY_SLACK = 1e-3
# Of log T; far below what any confidence could show.
_TOLERANCE = 1e-4
_GOLDEN = (sqrt(5) - 1) / 2


def fit_cascade(scores: Array, labels: Array, *, kind: ScoreKind, max_error_ratio: float) -> CascadeFit:
    """Fit temperature and threshold to `scores` (N, C) and the class indices `labels` (N,) int64.

    Raises:
        InvalidRequest: fewer than two classes, a label that is no index, or not one usable row.
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or scores.dtype.kind not in "fiu":
        raise InvalidRequest(
            f"cascade: expected scores (N, classes) of at least two classes, got {list(scores.shape)} {scores.dtype}"
        )
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise InvalidRequest(
            f"cascade: expected labels of 0 to {scores.shape[1] - 1}, got {labels.min()} to {labels.max()}"
        )
    logits, is_usable = _logits(scores.astype(np.float64), kind)
    if not is_usable.any():
        raise InvalidRequest("cascade: expected usable scores, got only rows with NaN, ties or values out of range")
    temperature = _fit_temperature(logits[is_usable], labels[is_usable])
    score = np.where(is_usable, confidence(logits, temperature), -1.0)
    is_wrong = logits.argmax(axis=1) != labels
    threshold = _threshold(score[is_usable], is_wrong[is_usable], max_error_ratio)
    kept = score >= threshold
    return CascadeFit(
        temperature=temperature,
        threshold=threshold,
        kept_ratio=float(kept.mean()),
        kept_error_ratio=float(is_wrong[kept].mean()) if kept.any() else 0.0,
    )


def confidence(logits: Array, temperature: float) -> Array:
    """Return max softmax(z / T) of every row, (N,) float64."""
    # The largest entry is exp(0) after the shift, so it is one over the sum of all.
    confidences: Array = 1.0 / np.exp(_shifted(logits) / temperature).sum(axis=1)
    return confidences


def _logits(scores: Array, kind: ScoreKind) -> tuple[Array, Array]:
    """Return z and which rows are usable; unusable rows of z are zeros."""
    is_usable = np.isfinite(scores).all(axis=1)
    if kind is ScoreKind.PROBABILITIES:
        is_usable &= ((scores >= 0) & (scores <= 1 + _PROBABILITY_SLACK)).all(axis=1)
    runner_up, best = np.partition(scores, -2, axis=1)[:, -2:].T
    is_usable &= runner_up < best
    usable = np.where(is_usable[:, None], scores, 1.0)
    if kind is ScoreKind.LOGITS:
        return usable, is_usable
    with np.errstate(divide="ignore"):
        # A probability of zero becomes minus infinity, which softmax takes as it is.
        return np.log(usable), is_usable


def _shifted(logits: Array) -> Array:
    shifted: Array = logits - logits.max(axis=1, keepdims=True)
    return shifted


def _fit_temperature(logits: Array, labels: Array) -> float:
    shifted = _shifted(logits)
    # A true class of probability zero would make every likelihood infinite; the smallest double stands in for it.
    of_label = np.maximum(shifted[np.arange(len(labels)), labels], log(np.finfo(np.float64).tiny))

    def loss(log_temperature: float) -> float:
        inverse = exp(-log_temperature)
        return float((np.log(np.exp(shifted * inverse).sum(axis=1)) - of_label * inverse).mean())

    return exp(_golden_section(loss, log(MIN_TEMPERATURE), log(MAX_TEMPERATURE)))


def _golden_section(loss: Callable[[float], float], low: float, high: float) -> float:
    """Return where `loss`, which has one minimum in [low, high], is least (Kiefer 1953)."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > _TOLERANCE:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = loss(right)
    return (low + high) / 2


def _threshold(scores: Array, is_wrong: Array, max_error_ratio: float) -> float:
    """Return the smallest threshold whose kept part is good enough; ESCALATE_ALL when there is none."""
    levels, level_of_row = np.unique(scores, return_inverse=True)
    # How many rows, and how many wrong ones, stand at each level or above it.
    kept = np.bincount(level_of_row)[::-1].cumsum()[::-1]
    wrong = np.bincount(level_of_row, weights=is_wrong)[::-1].cumsum()[::-1]
    good = np.flatnonzero(wrong <= max_error_ratio * kept)
    if not good.size:
        return ESCALATE_ALL
    lowest = int(good[0])
    return 0.0 if lowest == 0 else float((levels[lowest - 1] + levels[lowest]) / 2)
