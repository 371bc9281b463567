"""Confidence: the calibrated share of the winning class, or a word for why there is none."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from core.manifest import ScoreKind
from core.tensors import Array
from edge_agent.cascade.confidence import Flaw, Verdict, judge_scores, weakest

LOGITS, PROBABILITIES = ScoreKind.LOGITS, ScoreKind.PROBABILITIES


def judge(rows: object, *, kind: ScoreKind = LOGITS, temperature: float = 1.0) -> list[Verdict]:
    return list(judge_scores(np.array(rows, dtype=np.float32), kind=kind, temperature=temperature))


def test_the_confidence_is_the_largest_share_of_the_softmax() -> None:
    [verdict] = judge([[1.0, 3.0, 2.0]])
    assert verdict.confidence == pytest.approx(math.exp(3) / (math.exp(1) + math.exp(2) + math.exp(3)))
    assert verdict.flaw is None


def test_a_higher_temperature_lowers_the_confidence() -> None:
    [cold], [hot] = judge([[0.0, 4.0]]), judge([[0.0, 4.0]], temperature=2.0)
    assert cold.confidence == pytest.approx(1 / (1 + math.exp(-4)))
    assert hot.confidence == pytest.approx(1 / (1 + math.exp(-2)))


def test_probabilities_at_temperature_one_are_their_own_confidence() -> None:
    [verdict] = judge([[0.1, 0.7, 0.2]], kind=PROBABILITIES)
    assert verdict.confidence == pytest.approx(0.7)


def test_a_probability_of_zero_is_a_valid_score() -> None:
    [verdict] = judge([[0.0, 1.0]], kind=PROBABILITIES, temperature=2.0)
    assert verdict.confidence == pytest.approx(1.0)


def test_every_row_of_a_batch_is_judged_by_itself() -> None:
    verdicts = judge([[0.0, 2.0], [1.0, 1.0], [math.nan, 1.0], [5.0, 0.0]])
    assert [verdict.flaw for verdict in verdicts] == [None, Flaw.TIED, Flaw.NOT_FINITE, None]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [LOGITS, PROBABILITIES])
def test_a_score_that_is_not_finite_is_a_flaw(score: float, kind: ScoreKind) -> None:
    assert judge([[0.1, score, 0.2]], kind=kind) == [Verdict(None, Flaw.NOT_FINITE)]


@pytest.mark.parametrize("row", [[-0.1, 1.1], [0.2, 5.0]])
def test_a_number_outside_of_zero_to_one_is_no_probability(row: list[float]) -> None:
    assert judge([row], kind=PROBABILITIES) == [Verdict(None, Flaw.MALFORMED)]


def test_two_equal_winners_are_a_tie() -> None:
    assert judge([[2.0, 2.0, 1.0]]) == [Verdict(None, Flaw.TIED)]


def test_equal_losers_are_no_tie() -> None:
    assert judge([[2.0, 1.0, 1.0]])[0].flaw is None


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 3)])
def test_no_scores_are_a_flaw(shape: tuple[int, ...]) -> None:
    verdicts = judge_scores(np.zeros(shape, dtype=np.float32), kind=LOGITS, temperature=1.0)
    assert weakest(verdicts) == Verdict(None, Flaw.EMPTY)


@pytest.mark.parametrize("scores", [np.array([[1.0]]), np.array(1.0), np.array([[b"a", b"b"]], dtype=object)])
def test_scores_that_are_not_several_numbers_are_malformed(scores: Array) -> None:
    assert list(judge_scores(scores, kind=LOGITS, temperature=1.0)) == [Verdict(None, Flaw.MALFORMED)]


def test_integer_scores_are_judged_like_others() -> None:
    [verdict] = judge_scores(np.array([[0, 2]], dtype=np.int8), kind=LOGITS, temperature=1.0)
    assert verdict.confidence == pytest.approx(1 / (1 + math.exp(-2)))


def test_several_rows_of_one_request_are_as_sure_as_the_least_sure() -> None:
    assert weakest([Verdict(0.9), Verdict(0.4), Verdict(0.9)]) == Verdict(0.4)
    assert weakest([Verdict(0.4), Verdict(None, Flaw.TIED)]) == Verdict(None, Flaw.TIED)


@given(
    arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(width=32)),
    st.sampled_from([LOGITS, PROBABILITIES]),
    st.floats(0.01, 100),
)
def test_whatever_the_scores_there_is_one_verdict_per_row_with_either_a_confidence_or_a_flaw(
    scores: Array, kind: ScoreKind, temperature: float
) -> None:
    verdicts = judge_scores(scores, kind=kind, temperature=temperature)
    assert len(verdicts) == len(scores)
    for verdict in verdicts:
        assert (verdict.confidence is None) is (verdict.flaw is not None)
        assert verdict.confidence is None or 1 / scores.shape[1] * 0.999 <= verdict.confidence <= 1


@given(
    arrays(np.float32, st.tuples(st.integers(8, 12), st.integers(6, 9)), elements=st.floats(width=32)),
    st.sampled_from([LOGITS, PROBABILITIES]),
    st.floats(0.01, 100),
)
def test_a_large_batch_is_judged_as_its_rows_are(scores: Array, kind: ScoreKind, temperature: float) -> None:
    together = judge_scores(scores, kind=kind, temperature=temperature)
    apart = [judge_scores(row[np.newaxis], kind=kind, temperature=temperature)[0] for row in scores]
    assert [verdict.flaw for verdict in together] == [verdict.flaw for verdict in apart]
    for one, other in zip(together, apart, strict=True):
        assert one.confidence == pytest.approx(other.confidence) if one.confidence else other.confidence is None
