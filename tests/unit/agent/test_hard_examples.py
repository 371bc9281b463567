"""Which requests are offered to whoever collects hard examples: those that the edge was not sure enough of."""

import asyncio
import math

import pytest

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, Forbidden, HeavyUnavailable, NanofleetError
from core.open_inference.service import Call
from edge_agent.cascade.confidence import Flaw
from edge_agent.cascade.policy import Privacy, Reason, Tier
from edge_agent.hard_examples import HardExample
from tests.support.edge_plane import (
    SURE,
    UNSURE,
    FakeExamples,
    FakeHeavy,
    away,
    cascade_of,
    echo_model,
    plane_with,
    request_of,
)

NOT_FINITE = (math.nan, 1.0, 0.0)


def call_with(seconds: float = 5.0) -> Call:
    return Call(Deadline.after(seconds, now_s=SystemClock().monotonic_s()))


async def test_a_request_that_escalated_is_offered_with_both_answers() -> None:
    examples = FakeExamples()
    plane = await plane_with(echo_model(cascade=cascade_of()), examples=examples)
    await plane.ask(request_of(UNSURE, request_id="r1"), call_with())
    # The offer comes behind the answer.
    await asyncio.sleep(0)
    [example] = examples.offered
    assert (example.tier, example.reason, example.privacy) == (Tier.HEAVY, Reason.LOW_CONFIDENCE, Privacy.ANY)
    assert (example.model.manifest.model, example.request.id) == ("digits", "r1")
    assert example.outputs[0].shape == (1, 3)
    assert example.verdict.confidence is not None
    assert example.heavy is not None
    assert example.heavy.model_name == "large"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(HeavyUnavailable("away"), Reason.HEAVY_UNAVAILABLE), (DeadlineExceeded("late"), Reason.DEADLINE)],
)
async def test_a_request_that_should_have_escalated_is_offered(error: NanofleetError, reason: Reason) -> None:
    examples = FakeExamples()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=FakeHeavy(error), examples=examples)
    await plane.ask(request_of(UNSURE), call_with())
    await asyncio.sleep(0)
    [example] = examples.offered
    assert (example.tier, example.reason, example.heavy) == (Tier.EDGE, reason, None)


async def test_a_flawed_answer_that_is_given_to_nobody_is_offered() -> None:
    examples = FakeExamples()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), examples=examples)
    with pytest.raises(HeavyUnavailable):
        await plane.ask(request_of(NOT_FINITE), call_with())
    await asyncio.sleep(0)
    assert [example.verdict.flaw for example in examples.offered] == [Flaw.NOT_FINITE]


async def test_what_the_edge_is_sure_of_is_no_hard_example() -> None:
    examples = FakeExamples()
    plane = await plane_with(echo_model(cascade=cascade_of()), echo_model("plain"), examples=examples)
    await plane.ask(request_of(SURE), call_with())
    await plane.ask(request_of(UNSURE, model="plain"), call_with())
    assert examples.offered == []


@pytest.mark.parametrize("scores", [UNSURE, NOT_FINITE])
async def test_data_that_stay_on_the_device_are_never_offered(scores: tuple[float, ...]) -> None:
    examples = FakeExamples()
    plane = await plane_with(echo_model(cascade=cascade_of()), examples=examples)
    future = plane.ask(request_of(scores, privacy="device"), call_with())
    await asyncio.wait([future])
    assert future.exception() is None or isinstance(future.exception(), Forbidden)
    assert examples.offered == []


async def test_data_that_stay_on_the_site_are_offered_as_such() -> None:
    examples = FakeExamples()
    plane = await plane_with(echo_model(cascade=cascade_of()), examples=examples)
    await plane.ask(request_of(UNSURE, privacy="site"), call_with())
    assert [(example.privacy, example.reason) for example in examples.offered] == [(Privacy.SITE, Reason.PRIVACY)]


async def test_a_collector_that_fails_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeExamples):
        margin = 0.0

        def offer(self, example: HardExample) -> None:
            raise OSError("disk gone")

    plane = await plane_with(echo_model(cascade=cascade_of()), examples=Broken())
    assert (await plane.ask(request_of(UNSURE, privacy="site"), call_with())).tier is Tier.EDGE
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize(("margin", "is_offered"), [(0.2, True), (0.05, False), (0.0, False)])
async def test_an_answer_that_was_barely_sure_is_offered_within_the_margin(margin: float, is_offered: bool) -> None:
    examples = FakeExamples(margin=margin)
    plane = await plane_with(echo_model(cascade=cascade_of(threshold=0.5)), examples=examples)
    # Of confidence 0.59.
    answer = await plane.ask(request_of((0.0, 1.5, 0.5)))
    await asyncio.sleep(0)
    assert answer.reason is Reason.CONFIDENT
    assert [example.reason for example in examples.offered] == [Reason.CONFIDENT] * is_offered


async def test_a_model_without_a_cascade_is_never_barely_sure() -> None:
    examples = FakeExamples(margin=1.0)
    plane = await plane_with(echo_model(), examples=examples)
    await plane.ask(request_of(UNSURE))
    await asyncio.sleep(0)
    assert not examples.offered
