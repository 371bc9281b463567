"""Who answers: the edge, the large model, or nobody."""

import pytest

from core.errors import Forbidden
from edge_agent.cascade.confidence import Flaw, Verdict
from edge_agent.cascade.policy import Choice, Decision, Privacy, Reason, decide, fall_back, privacy_of
from tests.support.edge_plane import cascade_of

SURE, UNSURE = Verdict(0.95), Verdict(0.5)


def decision(verdict: Verdict | None, *, privacy: Privacy = Privacy.ANY, remaining_s: float | None = 1.0) -> Decision:
    return decide(verdict, cascade=cascade_of(0.9), privacy=privacy, remaining_s=remaining_s)


def test_a_confident_answer_stays_at_the_edge() -> None:
    assert decision(SURE) == Decision(Choice.ANSWER, Reason.CONFIDENT)


def test_a_confidence_that_equals_the_threshold_is_enough() -> None:
    assert decision(Verdict(0.9)).choice is Choice.ANSWER


def test_an_unsure_answer_escalates() -> None:
    assert decision(UNSURE) == Decision(Choice.ESCALATE, Reason.LOW_CONFIDENCE)


@pytest.mark.parametrize("flaw", list(Flaw))
def test_an_answer_with_a_flaw_escalates_for_that_reason(flaw: Flaw) -> None:
    assert decision(Verdict(None, flaw)) == Decision(Choice.ESCALATE, Reason(flaw.value))


def test_a_model_without_a_cascade_answers() -> None:
    without = decide(None, cascade=None, privacy=Privacy.ANY, remaining_s=None)
    assert without == Decision(Choice.ANSWER, Reason.NO_CASCADE)


@pytest.mark.parametrize("privacy", [Privacy.DEVICE, Privacy.SITE])
def test_private_data_never_escalates(privacy: Privacy) -> None:
    assert decision(UNSURE, privacy=privacy) == Decision(Choice.ANSWER, Reason.PRIVACY)


def test_private_data_without_a_usable_answer_is_refused() -> None:
    unusable = decision(Verdict(None, Flaw.NOT_FINITE), privacy=Privacy.SITE)
    assert unusable == Decision(Choice.REFUSE, Reason.PRIVACY)


def test_without_time_for_the_way_there_the_edge_answers() -> None:
    assert decision(UNSURE, remaining_s=0.005) == Decision(Choice.ANSWER, Reason.DEADLINE)


def test_without_a_deadline_there_is_time() -> None:
    assert decision(UNSURE, remaining_s=None).choice is Choice.ESCALATE


def test_when_the_heavy_tier_is_away_a_usable_answer_is_given_and_another_is_not() -> None:
    assert fall_back(UNSURE, Reason.HEAVY_UNAVAILABLE).choice is Choice.ANSWER
    assert fall_back(Verdict(None, Flaw.TIED), Reason.HEAVY_UNAVAILABLE).choice is Choice.REFUSE


def test_the_strictest_privacy_class_counts() -> None:
    assert privacy_of(["any", "device", "site"]) is Privacy.DEVICE
    assert privacy_of([]) is Privacy.ANY


@pytest.mark.parametrize("word", ["public", "", "ANY", 7, True])
def test_an_unknown_privacy_class_is_refused(word: object) -> None:
    with pytest.raises(Forbidden, match="expected device, site or any"):
        privacy_of(["any", word])
