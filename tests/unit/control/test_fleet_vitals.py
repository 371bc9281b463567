"""What agents say of themselves: kept newest, with the rates of the last minute, within a bound."""

from datetime import UTC, datetime, timedelta

import pytest

from controller.fleet.vitals import VitalsBoard
from core.fleet_state import Usage
from core.ids import AgentId
from tests.support.vitals_values import made_vitals

CAM = AgentId("cam-1")
START = datetime(2026, 1, 1, tzinfo=UTC)


class Board:
    """A board whose time passes when a test says so."""

    def __init__(self, *, max_agents: int = 4) -> None:
        self.passed_s = 0.0
        self.board = VitalsBoard(max_agents=max_agents, clock=self)

    def now(self) -> datetime:
        return START + timedelta(seconds=self.passed_s)

    def monotonic_s(self) -> float:
        return self.passed_s

    def says(self, *counts: int, boot: str = "a", uptime_s: float = 100.0) -> None:
        self.board.note(CAM, boot, made_vitals(*counts, uptime_s=uptime_s))


def test_an_agent_that_said_nothing_is_not_known() -> None:
    assert Board().board.of(CAM) is None


def test_the_newest_word_is_shown_with_when_counting_began() -> None:
    board = Board()
    board.passed_s = 200.0
    board.says(7, 2, uptime_s=150.0)

    seen = board.board.of(CAM)
    assert seen is not None
    assert seen.usage == Usage(7, 2)
    assert (seen.since, seen.reported_at) == (START + timedelta(seconds=50), START + timedelta(seconds=200))
    assert (seen.requests_per_s, seen.escalated_ratio) == (0.0, None)
    assert seen.health == made_vitals().health


def test_rates_are_those_of_the_last_minute() -> None:
    board = Board()
    for kth in range(9):
        board.says(45 * kth, 15 * kth)
        board.passed_s += 15.0

    seen = board.board.of(CAM)
    assert seen is not None
    # 60 every 15 s.
    assert seen.requests_per_s == pytest.approx(4.0)
    assert seen.escalated_ratio == 0.25


def test_an_agent_that_fell_silent_is_asked_nothing() -> None:
    board = Board()
    board.says(0)
    board.passed_s = 15.0
    board.says(600)
    board.passed_s = 80.0

    seen = board.board.of(CAM)
    assert seen is not None
    assert (seen.requests_per_s, seen.escalated_ratio) == (0.0, None)
    assert seen.usage == Usage(600)


def test_a_process_that_began_anew_counts_anew() -> None:
    board = Board()
    board.says(1000)
    board.passed_s = 15.0
    board.says(30, boot="b", uptime_s=5.0)

    seen = board.board.of(CAM)
    assert seen is not None
    assert (seen.usage, seen.requests_per_s) == (Usage(30), 0.0)
    assert seen.since == START + timedelta(seconds=10)


def test_an_agent_whose_numbers_shrink_is_shown_no_negative_rate() -> None:
    board = Board()
    board.says(1000)
    board.passed_s = 15.0
    board.says(10)

    seen = board.board.of(CAM)
    assert seen is not None
    assert seen.requests_per_s == 0.0


def test_an_uptime_from_before_all_time_is_borne() -> None:
    board = Board()
    board.says(1, uptime_s=1e10)
    board.board.note(CAM, "b", made_vitals(uptime_s=1e13))
    assert board.board.of(CAM) is not None


def test_those_who_spoke_longest_ago_are_forgotten_first() -> None:
    board = Board(max_agents=2)
    for name in ("a", "b", "a", "c"):
        board.board.note(AgentId(name), "boot", made_vitals())

    assert len(board.board) == 2
    assert board.board.of(AgentId("b")) is None
    assert board.board.of(AgentId("a")) is not None
