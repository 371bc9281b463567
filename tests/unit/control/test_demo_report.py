import numpy as np
import pytest

from controller.demo.app import is_survived
from controller.demo.failover import asked_most, failover_of
from controller.demo.report import outcome_of, traced_escalations

LABELS = np.array([0, 1, 2, 3], dtype=np.int64)
NO_TOTALS = {"late": 0, "duplicates": 0, "strangers": 0}


def answer(index: int, label: int, *, tier: str = "edge", latency_ms: float = 1.0, **more: object) -> dict[str, object]:
    outputs = {"label": [label]}
    row = {"index": index, "lost": False, "status": 200, "tier": tier, "latency_ms": latency_ms, "outputs": outputs}
    return {**row, **more}


def test_accuracy_and_share_escalated_count_every_picture() -> None:
    rows = [answer(0, 0), answer(1, 1, tier="heavy"), answer(2, 9), answer(3, 3)]
    outcome = outcome_of(rows, NO_TOTALS, LABELS)
    assert outcome.accuracy == pytest.approx(0.75)
    assert outcome.escalated_ratio == pytest.approx(0.25)
    assert outcome.answered == {"edge": 3, "heavy": 1}


def test_lost_refused_and_missing_pictures_are_counted_apart_and_never_right() -> None:
    refused = {"index": 1, "lost": False, "status": 503, "tier": "", "latency_ms": 1.0, "outputs": {}}
    outcome = outcome_of([{"index": 0, "lost": True}, refused, answer(2, 2)], NO_TOTALS, LABELS)
    assert (outcome.lost, outcome.refused) == (2, 1)
    assert outcome.accuracy == pytest.approx(0.25)


def test_latency_is_told_per_tier_and_absent_where_a_tier_never_answered() -> None:
    rows = [answer(index, index, latency_ms=float(index)) for index in range(4)]
    assert outcome_of(rows, NO_TOTALS, LABELS).latency_ms == {"edge": {"p50": 1.5, "p99": 2.97}}


def test_traced_escalations_come_newest_first() -> None:
    old, new = "a" * 32, "b" * 32
    rows = [
        answer(0, 0, tier="heavy", traceparent=f"00-{old}-{'1' * 16}-01"),
        answer(1, 1, traceparent=f"00-{'c' * 32}-{'1' * 16}-01"),
        answer(2, 2, tier="heavy", traceparent=f"00-{new}-{'1' * 16}-01"),
        answer(3, 3, tier="heavy"),
    ]
    assert traced_escalations(rows) == [new, old]


def asked(camera: str, agent: str, at_s: float, **more: object) -> dict[str, object]:
    return {"camera": camera, "agent": agent, "at_s": at_s, "lost": False, "status": 200, **more}


def test_a_camera_of_the_killed_agent_is_timed_until_its_neighbour_answers() -> None:
    rows = [
        asked("c1", "gate-1", 1.0),
        asked("c1", "gate-2", 2.25),
        asked("c1", "gate-2", 3.0),
        asked("c2", "gate-1", 1.5),
        asked("c2", "gate-2", 2.75),
        # It was at the neighbour before.
        asked("c3", "gate-2", 1.0),
        asked("c3", "gate-2", 2.5),
    ]
    figures = failover_of(rows, NO_TOTALS, victim="gate-1", killed_at_s=2.0)
    assert (figures["killed"], figures["answered_by"], figures["cameras"]) == ("gate-1", ["gate-2"], 2)
    assert figures["switch_ms"] == {"median": 500.0, "max": 750.0}
    assert (figures["n"], figures["after"], figures["lost"]) == (7, 4, 0)


def test_an_answer_of_the_killed_agent_that_was_still_on_its_way_is_no_switch() -> None:
    rows = [asked("c1", "gate-1", 1.0), asked("c1", "gate-1", 2.001), asked("c1", "gate-2", 2.25)]
    assert failover_of(rows, NO_TOTALS, victim="gate-1", killed_at_s=2.0)["switch_ms"]["max"] == 250.0


def test_a_camera_that_nobody_answers_any_more_has_not_survived() -> None:
    rows = [asked("c1", "gate-1", 1.0), {"camera": "c1", "lost": True, "at_s": 7.0}]
    figures = failover_of(rows, NO_TOTALS, victim="gate-1", killed_at_s=2.0)
    assert (figures["cameras"], figures["lost"]) == (0, 1)
    assert not is_survived(figures)


def test_the_agent_that_most_cameras_ask_is_the_one_to_kill() -> None:
    assert asked_most([asked("c1", "gate-1", 1.0), asked("c2", "gate-2", 1.0), asked("c3", "gate-2", 1.0)]) == "gate-2"
