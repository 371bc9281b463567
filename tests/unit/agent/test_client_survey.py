"""What a device knows of the agents of its site: status messages, round trips, penalties."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.client.directory import MAX_AGENTS, MAX_STATUS_BYTES, Directory, News
from edge_agent.client.measurements import FORGOTTEN_AFTER_S, RoundTrips
from edge_agent.client.survey import Survey


def status(state: str = "online", *, epoch: int = 1, models: tuple[str, ...] = ("digits",), **more: Any) -> bytes:
    return json.dumps({"state": state, "epoch": epoch, "models": [{"name": name} for name in models], **more}).encode()


def survey(*agents: str, client_id: str = "camera") -> Survey:
    made = Survey(client_id, uniform=lambda: 0.0)
    for agent in agents:
        made.hear(agent, status(), is_retained=True)
    return made


def order(known: Survey, *, now_s: float = 0.0) -> list[str]:
    return [sight.agent for sight in known.candidates("digits", now_s=now_s)]


def test_a_will_that_comes_late_does_not_shadow_a_newer_birth() -> None:
    directory = Directory()
    directory.hear("gate", status(epoch=1))
    assert directory.hear("gate", status(epoch=2)) is News.BORN
    assert directory.hear("gate", status("offline", epoch=1)) is News.NOTHING
    assert set(directory.online()) == {"gate"}


def test_a_will_of_the_newest_connection_takes_the_agent_away() -> None:
    directory = Directory()
    directory.hear("gate", status(epoch=2))
    assert directory.hear("gate", status("offline", epoch=2)) is News.GONE
    assert directory.hear("gate", status(epoch=2)) is News.NOTHING
    assert not directory.online()


def test_an_agent_whose_clock_was_set_back_is_believed_when_it_lives() -> None:
    directory = Directory()
    directory.hear("gate", status("offline", epoch=9))
    assert directory.hear("gate", status(epoch=3), is_retained=True) is News.NOTHING
    assert directory.hear("gate", status(epoch=3)) is News.BORN


def test_another_load_is_a_change_and_the_same_status_again_is_none() -> None:
    directory = Directory()
    directory.hear("gate", status(load={"room": 5}))
    assert directory.hear("gate", status(load={"room": 0})) is News.CHANGED
    assert directory.hear("gate", status(load={"room": 0})) is News.NOTHING


def test_a_status_that_was_cleared_takes_the_agent_away() -> None:
    directory = Directory()
    directory.hear("gate", status())
    assert directory.hear("gate", b"") is News.GONE


@pytest.mark.parametrize(
    "payload",
    [b"\xff", b"[]", b"{}", b'{"epoch": "1"}', b"[" * 100_000, b" " * (MAX_STATUS_BYTES + 1), b'{"epoch": NaN}'],
)
def test_a_malformed_status_is_no_news(payload: bytes) -> None:
    assert Directory().hear("gate", payload) is News.NOTHING


@given(st.binary(max_size=200) | st.from_type(dict).map(lambda value: json.dumps(value, default=str).encode()))
def test_no_status_breaks_a_device(payload: bytes) -> None:
    directory = Directory()
    directory.hear("gate", payload)
    assert len(directory.online()) <= 1


def test_models_that_are_no_list_of_names_are_none() -> None:
    directory = Directory()
    directory.hear("gate", json.dumps({"state": "online", "epoch": 1, "models": [1, {"name": 2}, {}]}).encode())
    assert not directory.online()["gate"].models


def test_of_too_many_agents_those_that_are_away_make_room() -> None:
    directory = Directory()
    for number in range(MAX_AGENTS):
        directory.hear(f"a{number}", status("offline" if number == 3 else "online"))
    directory.hear("new", status())
    directory.hear("one-too-many", status())
    assert "new" in directory
    assert "a3" not in directory
    assert "one-too-many" not in directory


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.integers(1, 5)), max_size=30))
def test_retained_or_late_a_smaller_epoch_never_takes_an_agent_away(
    messages: list[tuple[str, bool, int]],
) -> None:
    directory, newest = Directory(), dict[str, tuple[int, bool]]()
    for agent, is_online, epoch in messages:
        directory.hear(agent, status("online" if is_online else "offline", epoch=epoch), is_retained=True)
        known = newest.get(agent, (0, False))
        if epoch > known[0] or (epoch == known[0] and known[1]):
            newest[agent] = (epoch, is_online)
    assert set(directory.online()) == {agent for agent, (_, is_online) in newest.items() if is_online}


def test_without_a_status_any_agent_is_asked() -> None:
    assert order(survey()) == ["any"]


def test_only_agents_that_have_the_model_are_asked() -> None:
    known = survey("gate")
    known.hear("dock", status(models=("faces",)), is_retained=True)
    assert order(known) == ["gate"]


def test_an_agent_that_has_the_model_in_memory_is_asked_before_one_that_must_load_it() -> None:
    known = survey("gate", "dock")
    known.probed("gate", 0.002, room=10)
    known.probed("dock", 0.050, room=10)
    payload = json.dumps({"state": "online", "epoch": 1, "models": [{"name": "digits", "resident": False}]})
    known.hear("gate", payload.encode(), is_retained=False)
    assert order(known) == ["dock", "gate"]


def test_the_nearest_by_probes_is_asked_first() -> None:
    known = survey("gate", "dock")
    known.probed("gate", 0.050, room=10)
    known.probed("dock", 0.002, room=10)
    assert order(known) == ["dock", "gate"]


def test_an_agent_without_room_is_asked_after_those_that_have_some() -> None:
    known = survey("gate", "dock")
    known.probed("gate", 0.002, room=0)
    known.probed("dock", 0.050, room=1)
    assert order(known) == ["dock", "gate"]


def test_a_newer_status_counts_more_than_an_older_probe() -> None:
    known = survey("gate", "dock")
    known.probed("gate", 0.002, room=0)
    known.probed("dock", 0.050, room=1)
    known.hear("gate", status(load={"room": 7}), is_retained=False)
    assert order(known) == ["gate", "dock"]


def test_an_agent_that_refused_is_left_alone_for_as_long_as_it_said() -> None:
    known = survey("gate", "dock")
    known.probed("gate", 0.002, room=10)
    known.probed("dock", 0.050, room=10)
    assert known.refused("gate", for_s=2.0, now_s=10.0) == 12.0
    assert order(known, now_s=11.9) == ["dock", "gate"]
    assert order(known, now_s=12.0) == ["gate", "dock"]


def test_no_agent_may_ask_to_be_left_alone_for_ever() -> None:
    assert survey("gate").refused("gate", for_s=1e9, now_s=0.0) == 60.0


def test_a_silent_agent_is_asked_last_for_longer_each_time_and_is_forgiven_when_it_speaks() -> None:
    known = survey("gate", "dock")
    known.probed("gate", 0.002, room=10)
    known.probed("dock", 0.050, room=10)
    known.silent("gate", now_s=0.0)
    assert order(known, now_s=0.9) == ["dock", "gate"]
    assert order(known, now_s=1.0) == ["gate", "dock"]
    known.silent("gate", now_s=1.0)
    assert order(known, now_s=2.9) == ["dock", "gate"]
    known.answered("gate", None, now_s=2.9)
    assert order(known, now_s=2.9) == ["gate", "dock"]


def test_an_agent_that_is_born_anew_starts_without_penalty() -> None:
    known = survey("gate", "dock")
    known.probed("gate", 0.002, room=10)
    known.probed("dock", 0.050, room=10)
    known.silent("gate", now_s=0.0)
    known.hear("gate", status(epoch=2), is_retained=False)
    assert order(known) == ["gate", "dock"]


def test_devices_that_know_nothing_of_distances_spread_over_the_agents() -> None:
    first = {order(survey("gate", "dock", client_id=f"camera-{number}"))[0] for number in range(16)}
    assert first == {"gate", "dock"}


def test_answers_say_how_slow_an_agent_is_once_there_are_enough() -> None:
    trips = RoundTrips()
    for number in range(7):
        trips.note_answer(0.01, now_s=float(number))
    assert trips.slow_s is None
    trips.note_answer(0.5, now_s=8.0)
    assert trips.slow_s == 0.5


def test_old_answers_say_nothing_so_that_a_slow_agent_gets_another_chance() -> None:
    trips = RoundTrips()
    trips.note_answer(1.0, now_s=0.0)
    assert trips.answer_s(FORGOTTEN_AFTER_S - 0.1) == 1.0
    assert trips.answer_s(FORGOTTEN_AFTER_S) is None
