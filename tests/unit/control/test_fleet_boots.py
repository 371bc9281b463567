"""Telling a restart from a second machine, by boot ids."""

from controller.fleet.boots import MAX_BOOTS, QUIET_S, BootHistory
from core.ids import AgentId
from tests.support.fleet_values import CAM


def test_restarts_of_one_machine_stay_single_however_many_they_are() -> None:
    history = BootHistory(max_agents=10)

    assert all(history.is_single(CAM, f"boot-{number}", now_s=number) for number in range(3 * MAX_BOOTS))


def test_reconnects_of_one_boot_stay_single() -> None:
    history = BootHistory(max_agents=10)

    assert all(history.is_single(CAM, "boot-1", now_s=second) for second in range(5))


def test_an_older_boot_that_comes_back_is_a_second_machine_and_neither_is_single() -> None:
    history = BootHistory(max_agents=10)
    history.is_single(CAM, "a", now_s=0)
    history.is_single(CAM, "b", now_s=1)

    assert not history.is_single(CAM, "a", now_s=2)
    assert not history.is_single(CAM, "b", now_s=3)
    assert not history.is_single(CAM, "c", now_s=4)


def test_an_older_boot_counts_as_a_second_machine_however_long_it_was_silent() -> None:
    history = BootHistory(max_agents=10)
    history.is_single(CAM, "a", now_s=0)
    history.is_single(CAM, "b", now_s=1)

    assert not history.is_single(CAM, "a", now_s=10 * QUIET_S)


def test_a_machine_is_served_again_when_the_other_one_has_been_silent() -> None:
    history = BootHistory(max_agents=10)
    for now_s, boot in enumerate(("a", "b", "a")):
        history.is_single(CAM, boot, now_s=now_s)

    assert not history.is_single(CAM, "b", now_s=QUIET_S)
    assert history.is_single(CAM, "b", now_s=2 + QUIET_S)
    assert history.is_single(CAM, "b", now_s=3 + QUIET_S)


def test_a_name_given_to_another_machine_starts_anew() -> None:
    history = BootHistory(max_agents=10)
    for now_s, boot in enumerate(("a", "b", "a")):
        history.is_single(CAM, boot, now_s=now_s)

    history.forget(CAM)

    assert history.is_single(CAM, "b", now_s=4)


def test_the_agents_longest_unheard_are_forgotten() -> None:
    history = BootHistory(max_agents=2)
    for number in range(4):
        history.is_single(AgentId(f"agent-{number}"), "boot", now_s=number)

    assert len(history) == 2
