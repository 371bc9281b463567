"""Whatever heavy tier, network and device do, a request ends in one final answer, and nothing private leaves.

Random requests meet a heavy tier in random states; what must always hold is checked at the end of each.
"""

import asyncio
import math
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, Forbidden, HeavyUnavailable, InvalidRequest, NanofleetError, Overloaded
from core.open_inference.service import Call
from edge_agent.answer import Answer
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.terms import Terms
from tests.support.edge_plane import (
    SURE,
    UNSURE,
    FakeDeferrals,
    FakeExamples,
    FakeHeavy,
    FakeMailbox,
    cascade_of,
    echo_model,
    plane_with,
    request_of,
)

FLAWED = ((math.nan, 1.0, 0.0), (1.0, 1.0, 0.0), (math.inf, 0.0, 0.0))
ERRORS = (
    None,
    HeavyUnavailable("away"),
    DeadlineExceeded("late"),
    InvalidRequest("another input"),
    Overloaded("busy"),
)


@dataclass(frozen=True, slots=True)
class Situation:
    scores: tuple[float, ...]
    terms: Terms
    has_mailbox: bool
    error: NanofleetError | None
    obstacle: Reason | None
    is_reachable: bool
    room: int


SITUATIONS = st.builds(
    Situation,
    st.sampled_from([SURE, UNSURE, *FLAWED]),
    st.builds(
        Terms,
        st.just("camera-1"),
        st.sampled_from([None, "device", "site", "any"]),
        accepts_provisional=st.booleans(),
        is_deferrable=st.booleans(),
    ),
    st.booleans(),
    st.sampled_from(ERRORS),
    st.sampled_from([None, None, Reason.DEADLINE, Reason.HEAVY_UNAVAILABLE]),
    st.booleans(),
    st.sampled_from([0, 1]),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    answers: list[Answer]
    refusal: NanofleetError | None
    heavy: FakeHeavy
    deferrals: FakeDeferrals
    examples: FakeExamples
    counted: int


async def outcome_of(situation: Situation) -> Outcome:
    heavy, deferrals, examples = FakeHeavy(situation.error), FakeDeferrals(room=situation.room), FakeExamples()
    heavy.known_obstacle = situation.obstacle
    plane = await plane_with(
        echo_model(cascade=cascade_of()),
        heavy=heavy,
        deferrals=deferrals,
        examples=examples,
        is_reachable=lambda: situation.is_reachable,
    )
    call = Call(Deadline.after(60, now_s=SystemClock().monotonic_s()))
    mailbox = FakeMailbox() if situation.has_mailbox else None
    answers: list[Answer] = []
    refusal = None
    following: asyncio.Future[Answer] | None = plane.ask(
        request_of(situation.scores), call, situation.terms, mailbox=mailbox
    )
    async with asyncio.timeout(5):
        while following is not None:
            try:
                answers.append(await following)
            except NanofleetError as error:
                refusal = error
                break
            following = answers[-1].later
    # The offer comes behind the answer.
    await asyncio.sleep(0)
    usage = plane.metrics.usage()
    counted = usage.answered_edge + usage.answered_heavy + usage.refused + usage.failed
    return Outcome(answers, refusal, heavy, deferrals, examples, counted)


@settings(max_examples=400, deadline=None)
@given(SITUATIONS)
def test_every_request_ends_as_it_should(situation: Situation) -> None:
    outcome = asyncio.run(outcome_of(situation))
    answers, terms = outcome.answers, situation.terms
    is_flawed = situation.scores in FLAWED
    is_private = terms.privacy in ("device", "site")

    # One end, counted once: a final answer, a refusal, or a promise that somebody keeps.
    ends = [answer for answer in answers if answer.later is None]
    assert len(ends) + (outcome.refusal is not None) == 1
    assert outcome.counted == 1
    promised = [answer for answer in ends if not answer.is_final]
    assert len(promised) == len(outcome.deferrals.taken) <= 1

    # Two answers only for who can take them and has asked for them.
    if len(answers) > 1 or promised:
        assert situation.has_mailbox
        assert terms.accepts_provisional or terms.is_deferrable
    assert all(answer.tier is Tier.EDGE for answer in answers if not answer.is_final)

    # Private data go nowhere; those of a device not even into the samples.
    if is_private:
        assert (outcome.heavy.asked, outcome.deferrals.taken) == ([], [])
    if terms.privacy == "device":
        assert outcome.examples.offered == []

    # A flawed answer of the edge reaches nobody.
    if is_flawed:
        assert all(answer.tier is Tier.HEAVY for answer in answers)
        assert isinstance(outcome.refusal, HeavyUnavailable | Forbidden | None)
    if situation.scores == SURE:
        assert [(answer.reason, answer.is_final) for answer in answers] == [(Reason.CONFIDENT, True)]
        assert outcome.examples.offered == []
    elif terms.privacy != "device":
        assert len(outcome.examples.offered) == 1

    # What is known to be out of reach is not asked.
    if not situation.is_reachable or situation.obstacle is not None:
        assert outcome.heavy.asked == []
