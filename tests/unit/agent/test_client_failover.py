"""What a device does next about one request, in virtual time."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.client.failover import MAX_SENT, Attempts, GiveUp, Send, Wait
from edge_agent.client.ranking import Sight

NEAR, FAR = Sight("near", slow_s=0.1), Sight("far", slow_s=0.1)


def attempts(*, ends_s: float = 5.0) -> Attempts:
    return Attempts(ends_s=ends_s)


def test_the_first_candidate_is_asked_first() -> None:
    assert attempts().next_step([NEAR, FAR], now_s=0.0) == Send("near")


def test_a_silent_agent_is_followed_by_the_next_one_while_there_is_time() -> None:
    under_way = attempts()
    under_way.next_step([NEAR, FAR], now_s=0.0)
    assert under_way.next_step([NEAR, FAR], now_s=0.0) == Wait(0.25)
    assert under_way.overdue(now_s=0.25) == ["near"]
    assert under_way.next_step([NEAR, FAR], now_s=0.25) == Send("far")
    # Both may still answer.
    assert under_way.awaited == ["near", "far"]
    assert under_way.next_step([NEAR, FAR], now_s=0.25) == Wait(5.0)
    assert isinstance(under_way.next_step([NEAR, FAR], now_s=5.0), GiveUp)


def test_an_agent_that_refuses_is_followed_at_once() -> None:
    under_way = attempts()
    under_way.next_step([NEAR, FAR], now_s=0.0)
    under_way.refused("near", until_s=9.0)
    assert under_way.next_step([NEAR, FAR], now_s=0.01) == Send("far")


def test_an_agent_that_goes_away_is_followed_at_once() -> None:
    under_way = attempts()
    under_way.next_step([NEAR, FAR], now_s=0.0)
    under_way.gone("near")
    assert under_way.next_step([FAR], now_s=0.01) == Send("far")


def test_when_all_refuse_the_first_to_be_free_is_asked_again_if_that_is_in_time() -> None:
    under_way = attempts()
    for agent, until_s in (("near", 2.0), ("far", 3.0)):
        assert under_way.next_step([NEAR, FAR], now_s=0.0) == Send(agent)
        under_way.refused(agent, until_s=until_s)
    assert under_way.next_step([NEAR, FAR], now_s=0.0) == Wait(2.0)
    assert under_way.next_step([NEAR, FAR], now_s=2.0) == Send("near", is_repeat=True)


def test_when_all_refuse_for_longer_than_there_is_time_nobody_is_asked_again() -> None:
    under_way = attempts(ends_s=1.0)
    for agent in ("near", "far"):
        under_way.next_step([NEAR, FAR], now_s=0.0)
        under_way.refused(agent, until_s=2.0)
    assert isinstance(under_way.next_step([NEAR, FAR], now_s=0.1), GiveUp)


def test_an_agent_without_the_model_is_not_asked_again() -> None:
    under_way = attempts()
    under_way.next_step([NEAR], now_s=0.0)
    under_way.refused("near", until_s=float("inf"))
    assert isinstance(under_way.next_step([NEAR], now_s=0.1), GiveUp)


def test_an_agent_in_the_penalty_box_is_asked_when_nobody_else_is_left_and_time_is_short() -> None:
    boxed = Sight("boxed", free_from_s=60.0)
    assert attempts().next_step([boxed], now_s=0.0) == Send("boxed")


def test_what_is_awaited_is_sent_again_after_a_reconnect() -> None:
    under_way = attempts()
    under_way.next_step([NEAR], now_s=0.0)
    under_way.reconnected()
    assert under_way.next_step([NEAR], now_s=1.0) == Send("near", is_repeat=True)
    assert under_way.next_step([NEAR], now_s=1.0) == Wait(5.0)


def test_an_agent_that_is_born_anew_gets_what_it_had_not_answered() -> None:
    under_way = attempts()
    under_way.next_step([NEAR], now_s=0.0)
    under_way.born("near")
    assert under_way.next_step([NEAR], now_s=1.0) == Send("near", is_repeat=True)


def test_an_agent_that_appears_is_asked_although_any_was() -> None:
    under_way = attempts()
    assert under_way.next_step([Sight("any")], now_s=0.0) == Send("any")
    assert under_way.next_step([Sight("any")], now_s=0.0) == Wait(5.0)
    under_way.born("near")
    assert under_way.next_step([NEAR], now_s=1.0) == Send("near")


def test_an_agent_that_appears_gets_its_share_of_the_time_of_a_silent_one() -> None:
    under_way = attempts()
    under_way.next_step([NEAR], now_s=0.0)
    assert under_way.next_step([NEAR], now_s=0.5) == Wait(5.0)
    assert under_way.next_step([NEAR, FAR], now_s=1.0) == Wait(1.25)
    assert under_way.next_step([NEAR, FAR], now_s=1.25) == Send("far")


def test_nobody_else_is_asked_while_a_better_answer_is_on_its_way() -> None:
    under_way = attempts()
    under_way.next_step([NEAR, FAR], now_s=0.0)
    under_way.answered_provisionally()
    assert under_way.next_step([NEAR, FAR], now_s=1.0) == Wait(5.0)
    under_way.gone("near")
    assert under_way.next_step([FAR], now_s=1.0) == Send("far")


@dataclass(frozen=True)
class Behaviour:
    """An agent that answers after so long, refuses, or never says anything."""

    answers_after_s: float | None
    refuses_for_s: float | None = None


BEHAVIOURS = st.one_of(
    st.builds(Behaviour, st.floats(0.001, 0.2)),
    st.just(Behaviour(None)),
    st.builds(Behaviour, st.none(), st.floats(0.01, 20.0)),
)


def play(behaviours: dict[str, Behaviour], *, ends_s: float) -> tuple[float | None, list[str]]:
    """Return when an answer came, and who was asked."""
    under_way, now_s, sent = attempts(ends_s=ends_s), 0.0, list[str]()
    answers: list[float] = []
    free_from_s = dict.fromkeys(behaviours, 0.0)
    while True:
        sights = [Sight(agent, slow_s=0.2, free_from_s=free_from_s[agent]) for agent in behaviours]
        step = under_way.next_step(sights, now_s=now_s)
        if isinstance(step, GiveUp):
            return None, sent
        if isinstance(step, Wait):
            assert step.until_s > now_s
            if answers and min(answers) <= step.until_s:
                return min(answers), sent
            now_s = step.until_s
            continue
        sent.append(step.agent)
        behaviour = behaviours[step.agent]
        if behaviour.answers_after_s is not None:
            answers.append(now_s + behaviour.answers_after_s)
        if behaviour.refuses_for_s is not None:
            free_from_s[step.agent] = now_s + behaviour.refuses_for_s
            under_way.refused(step.agent, until_s=free_from_s[step.agent])


@given(st.lists(BEHAVIOURS, min_size=1, max_size=5))
def test_with_one_good_agent_among_the_first_three_there_is_an_answer_in_time(behaviours: list[Behaviour]) -> None:
    site = {f"a{number}": behaviour for number, behaviour in enumerate(behaviours)}
    answered_s, sent = play(site, ends_s=5.0)
    assert len(sent) <= MAX_SENT
    if any(behaviour.answers_after_s is not None for behaviour in behaviours[:3]):
        assert answered_s is not None
        assert answered_s < 5.0


@given(st.lists(BEHAVIOURS, min_size=1, max_size=5))
def test_no_agent_that_may_still_answer_is_asked_twice(behaviours: list[Behaviour]) -> None:
    site = {f"a{number}": behaviour for number, behaviour in enumerate(behaviours)}
    _, sent = play(site, ends_s=5.0)
    silent = [agent for agent in sent if site[agent].refuses_for_s is None]
    assert len(silent) == len(set(silent))
