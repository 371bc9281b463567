"""Fitting a cascade: temperature, threshold, and agreement with how the edge judges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from controller.compression.calibrate import ESCALATE_ALL, MAX_TEMPERATURE, MIN_TEMPERATURE, confidence, fit_cascade
from core.errors import InvalidRequest
from core.manifest import Cascade, ScoreKind
from core.tensors import Array
from edge_agent.cascade.confidence import judge_scores
from edge_agent.cascade.policy import Choice, Privacy, decide


def sampled(temperature: float, *, rows: int = 20_000, classes: int = 5) -> tuple[Array, Array]:
    """Return logits, and labels drawn from softmax(z / temperature): that temperature is the right one."""
    random = np.random.default_rng(7)
    logits = random.normal(0, 3, (rows, classes))
    # Gumbel's trick: the largest of z / T + noise is a draw from softmax(z / T).
    labels = (logits / temperature + random.gumbel(size=logits.shape)).argmax(axis=1)
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    logits, labels = sampled(temperature)

    fit = fit_cascade(logits, labels, kind=ScoreKind.LOGITS, max_error_ratio=0.1)

    assert fit.temperature == pytest.approx(temperature, rel=0.05)


def test_probabilities_and_their_logarithms_are_fitted_alike() -> None:
    logits, labels = sampled(1.5)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    of_logits = fit_cascade(logits, labels, kind=ScoreKind.LOGITS, max_error_ratio=0.1)
    of_probabilities = fit_cascade(probabilities, labels, kind=ScoreKind.PROBABILITIES, max_error_ratio=0.1)

    assert of_probabilities.temperature == pytest.approx(of_logits.temperature, rel=1e-3)
    assert of_probabilities.threshold == pytest.approx(of_logits.threshold, rel=1e-3)


def test_a_model_without_mistakes_keeps_everything_and_stays_in_bounds() -> None:
    logits = np.eye(3)[[0, 1, 2, 1]] * 4

    fit = fit_cascade(logits, np.array([0, 1, 2, 1]), kind=ScoreKind.LOGITS, max_error_ratio=0.0)

    assert (fit.threshold, fit.kept_ratio, fit.kept_error_ratio) == (0.0, 1.0, 0.0)
    assert fit.temperature == pytest.approx(MIN_TEMPERATURE, rel=1e-3)


def test_the_threshold_parts_the_wrong_answers_from_the_right_ones() -> None:
    logits = np.array([[4.0, 0], [3.0, 0], [2.0, 0], [1.0, 0]])
    labels = np.array([0, 0, 1, 1])

    fit = fit_cascade(logits, labels, kind=ScoreKind.LOGITS, max_error_ratio=0.0)

    kept = confidence(logits, fit.temperature) >= fit.threshold
    assert kept.tolist() == [True, True, False, False]
    assert (fit.kept_ratio, fit.kept_error_ratio) == (0.5, 0.0)


def test_the_threshold_is_the_smallest_that_is_good_enough() -> None:
    logits, labels = sampled(1.0)

    fit = fit_cascade(logits, labels, kind=ScoreKind.LOGITS, max_error_ratio=0.1)

    confidences = confidence(logits, fit.temperature)
    is_wrong = logits.argmax(axis=1) != labels
    lower = np.sort(confidences[confidences < fit.threshold])[::-1]
    assert is_wrong[confidences >= fit.threshold].mean() <= 0.1
    assert all(is_wrong[confidences >= level].mean() > 0.1 for level in lower[:200])


def test_when_no_threshold_is_good_enough_everything_escalates() -> None:
    logits = np.array([[2.0, 0.0], [1.0, 0.0]])

    fit = fit_cascade(logits, np.array([1, 1]), kind=ScoreKind.LOGITS, max_error_ratio=0.1)

    assert (fit.threshold, fit.kept_ratio, fit.kept_error_ratio) == (ESCALATE_ALL, 0.0, 0.0)
    assert fit.temperature == pytest.approx(MAX_TEMPERATURE, rel=1e-3)


def test_unusable_rows_count_as_escalated() -> None:
    usable = [[0.9, 0.1], [0.8, 0.2]]
    unusable = [[np.nan, 0.5], [np.inf, 0.0], [0.5, 0.5], [-0.1, 1.1], [0.3, 1.2]]

    fit = fit_cascade(
        np.array(usable + unusable), np.zeros(7, np.int64), kind=ScoreKind.PROBABILITIES, max_error_ratio=0.0
    )

    assert fit.kept_ratio == pytest.approx(2 / 7)


def test_a_true_class_of_probability_zero_does_not_break_the_fit() -> None:
    scores = np.array([[1.0, 0.0], [0.9, 0.1], [0.2, 0.8]], np.float32)

    fit = fit_cascade(scores, np.array([1, 0, 1]), kind=ScoreKind.PROBABILITIES, max_error_ratio=0.5)

    assert MIN_TEMPERATURE <= fit.temperature <= MAX_TEMPERATURE


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (np.ones((3, 1)), [0, 0, 0]),
        (np.ones(3), [0, 0, 0]),
        (np.eye(3), [0, 1, 3]),
        (np.eye(3), [0, -1, 2]),
        (np.ones((3, 2)), [0, 0, 0]),
        (np.full((3, 2), "a"), [0, 0, 0]),
    ],
)
def test_scores_that_cannot_be_fitted_are_refused(scores: Array, labels: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="cascade: "):
        fit_cascade(scores, np.array(labels), kind=ScoreKind.LOGITS, max_error_ratio=0.1)


@given(
    arrays(np.float32, (12, 4), elements=st.floats(-30, 30, width=32) | st.sampled_from([np.nan, np.inf, 0.0, 1.0])),
    st.sampled_from(list(ScoreKind)),
    st.sampled_from([0.0, 0.2, 0.5]),
)
def test_the_edge_keeps_exactly_what_the_fit_says_it_keeps(
    scores: Array, kind: ScoreKind, max_error_ratio: float
) -> None:
    labels = np.arange(12) % 4
    try:
        fit = fit_cascade(scores, labels, kind=kind, max_error_ratio=max_error_ratio)
    except InvalidRequest:
        return
    cascade = Cascade(
        escalate_to="large",
        score_output="y",
        score_kind=kind,
        temperature=fit.temperature,
        threshold=fit.threshold,
    )

    verdicts = judge_scores(scores, kind=kind, temperature=fit.temperature)
    kept = [
        decide(verdict, cascade=cascade, privacy=Privacy.ANY, remaining_s=None).choice is Choice.ANSWER
        for verdict in verdicts
    ]

    assert sum(kept) == round(fit.kept_ratio * 12)
