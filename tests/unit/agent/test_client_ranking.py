"""Whom a device asks first, and for how long it waits: properties of the pure choice."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.client.probing import ACTIVE_S, FIRST_WITHIN_S, MAX_PER_PERIOD, PERIOD_S, Probing
from edge_agent.client.ranking import MIN_PATIENCE_S, Sight, patience_s, ranked

SECONDS = st.floats(0.0001, 10.0)
SIGHTS = st.lists(
    st.builds(
        Sight,
        agent=st.text("abcdef", min_size=1, max_size=3),
        network_s=st.none() | SECONDS,
        answer_s=st.none() | SECONDS,
        slow_s=st.none() | SECONDS,
        has_room=st.booleans(),
        is_loaded=st.booleans(),
        is_silent=st.booleans(),
        free_from_s=st.floats(0, 20),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda sight: sight.agent,
)


def order(sights: Sequence[Sight], *, current: str | None = None, now_s: float = 0.0) -> list[str]:
    return [sight.agent for sight in ranked(sights, current=current, spread=len, now_s=now_s)]


@given(SIGHTS, st.floats(0, 20), st.text("abcdef", max_size=3))
def test_every_agent_is_in_the_order_once(sights: list[Sight], now_s: float, current: str) -> None:
    assert sorted(order(sights, current=current, now_s=now_s)) == sorted(sight.agent for sight in sights)


@given(SIGHTS, st.floats(0, 20), st.text("abcdef", max_size=3))
def test_the_first_answers_and_has_room_when_any_does(sights: list[Sight], now_s: float, current: str) -> None:
    first = ranked(sights, current=current, spread=len, now_s=now_s)[0]
    is_good = [not sight.is_silent and sight.free_from_s <= now_s and sight.has_room for sight in sights]
    if any(is_good):
        assert is_good[sights.index(first)]


@given(SIGHTS, st.floats(0, 20))
def test_the_order_does_not_depend_on_the_order_of_the_statuses(sights: list[Sight], now_s: float) -> None:
    spread = {sight.agent: float(at) for at, sight in enumerate(sights)}
    forwards = ranked(sights, current=None, spread=spread.__getitem__, now_s=now_s)
    assert ranked(sights[::-1], current=None, spread=spread.__getitem__, now_s=now_s) == forwards


@given(SIGHTS, st.floats(0.001, 60), st.integers(0, 8))
def test_a_silent_agent_leaves_time_for_another(sights: list[Sight], left_s: float, others: int) -> None:
    waited_s = patience_s(sights[0], left_s=left_s, others=others)
    assert 0 < waited_s <= left_s
    if others:
        assert waited_s <= left_s / 2


def test_the_only_agent_has_all_the_time() -> None:
    assert patience_s(Sight("a", slow_s=0.001), left_s=5.0, others=0) == 5.0


def test_an_agent_that_was_measured_is_waited_for_as_long_as_it_may_take() -> None:
    assert patience_s(Sight("a", slow_s=0.4), left_s=5.0, others=1) == 0.8
    assert patience_s(Sight("a", slow_s=0.001), left_s=5.0, others=1) == MIN_PATIENCE_S


def test_an_agent_is_not_left_for_one_that_is_hardly_nearer() -> None:
    here, there = Sight("here", network_s=0.010), Sight("there", network_s=0.009)
    assert order([here, there], current="here") == ["here", "there"]
    assert order([here, Sight("there", network_s=0.002)], current="here") == ["there", "here"]


def test_an_agent_that_only_probes_know_is_taken_to_work_as_fast_as_the_others() -> None:
    used = Sight("used", network_s=0.002, answer_s=0.012)
    assert order([used, Sight("far", network_s=0.040)]) == ["used", "far"]
    assert order([Sight("used", network_s=0.040, answer_s=0.050), Sight("near", network_s=0.002)]) == ["near", "used"]


def test_a_model_in_memory_is_preferred_to_a_nearer_one_that_must_be_loaded() -> None:
    assert order([Sight("cold", network_s=0.001, is_loaded=False), Sight("warm", network_s=0.02)]) == ["warm", "cold"]


def test_probes_come_soon_after_the_start_and_then_once_a_period() -> None:
    probing = Probing(uniform=lambda: 0.5)
    probing.active(now_s=0.0)
    probing.due(["a"], now_s=0.0)
    assert probing.due(["a"], now_s=FIRST_WITHIN_S) == ["a"]
    assert probing.due(["a"], now_s=FIRST_WITHIN_S + PERIOD_S - 0.1) == []
    assert probing.due(["a"], now_s=FIRST_WITHIN_S + PERIOD_S) == ["a"]


def test_a_device_that_asks_nothing_probes_nothing() -> None:
    probing = Probing(uniform=lambda: 0.5)
    assert not probing.is_time(now_s=1.0)
    probing.active(now_s=1.0)
    assert probing.is_time(now_s=1.1)
    assert not probing.is_time(now_s=1.0 + ACTIVE_S)


def test_an_agent_that_is_back_is_probed_next() -> None:
    probing = Probing(uniform=lambda: 0.0)
    assert probing.due(["a"], now_s=0.0) == ["a"]
    assert probing.due(["a"], now_s=1.0) == []
    probing.soon("a")
    assert probing.due(["a"], now_s=1.0) == ["a"]


@given(st.integers(1, 64), st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_probes_do_not_grow_with_the_site(agents: int, numbers: list[float]) -> None:
    draws = iter(numbers * 10_000)
    probing = Probing(uniform=lambda: next(draws))
    names = [f"a{number}" for number in range(agents)]
    # Four periods, without the first, in which each is probed once whatever happens.
    sent = sum(len(probing.due(names, now_s=at / 4)) for at in range(int(5 * PERIOD_S * 4)))
    assert sent <= agents + 5 * 2 * MAX_PER_PERIOD + agents
