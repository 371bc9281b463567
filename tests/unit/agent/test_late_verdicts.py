"""Answers that come in two parts: the edge's now, the heavy tier's later, within the deadline or after an outage."""

import asyncio
import math

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, HeavyUnavailable
from core.open_inference.messages import InferRequest
from core.open_inference.service import Call
from core.telemetry import Tracing, TracingSettings
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.terms import Terms
from tests.support.edge_plane import (
    SURE,
    UNSURE,
    FakeDeferrals,
    FakeHeavy,
    FakeMailbox,
    GatedHeavy,
    away,
    cascade_of,
    echo_model,
    plane_with,
    request_of,
)

NOT_FINITE = (math.nan, 1.0, 0.0)
TIED = (1.0, 1.0, 0.0)
PROVISIONAL = Terms("camera-1", accepts_provisional=True)
DEFERRABLE = Terms("camera-1", is_deferrable=True)
BOTH = Terms("camera-1", accepts_provisional=True, is_deferrable=True)
MAILBOX = FakeMailbox()


def recording() -> tuple[Tracing, InMemorySpanExporter]:
    tracing = Tracing("test", TracingSettings(endpoint=None, sample_ratio=1.0))
    exporter = InMemorySpanExporter()
    tracing._provider.add_span_processor(SimpleSpanProcessor(exporter))
    return tracing, exporter


def call_with(seconds: float = 5.0) -> Call:
    return Call(Deadline.after(seconds, now_s=SystemClock().monotonic_s()))


async def test_a_provisional_answer_comes_before_the_heavy_tier_has_answered() -> None:
    heavy = GatedHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    first = await plane.ask(request_of(UNSURE), call_with(), PROVISIONAL, mailbox=MAILBOX)
    assert (first.tier, first.reason, first.is_final) == (Tier.EDGE, Reason.LOW_CONFIDENCE, False)
    assert first.later is not None
    assert not first.later.done()
    heavy.gate.set()
    last = await first.later
    assert (last.tier, last.reason, last.is_final, last.later) == (Tier.HEAVY, Reason.LOW_CONFIDENCE, True, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (HeavyUnavailable("heavy tier: away"), Reason.HEAVY_UNAVAILABLE),
        (DeadlineExceeded("heavy tier: too slow"), Reason.DEADLINE),
    ],
)
async def test_a_provisional_answer_is_made_final_when_the_heavy_tier_fails_or_is_late(
    error: HeavyUnavailable | DeadlineExceeded, reason: Reason
) -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=FakeHeavy(error))
    first = await plane.ask(request_of(UNSURE), call_with(), PROVISIONAL, mailbox=MAILBOX)
    assert first.later is not None
    last = await first.later
    assert (last.tier, last.reason, last.is_final) == (Tier.EDGE, reason, True)
    assert last.response.outputs[0].array.tolist() == first.response.outputs[0].array.tolist()


async def test_a_provisional_answer_is_made_final_when_the_agent_stops() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=GatedHeavy())
    first = await plane.ask(request_of(UNSURE), call_with(), PROVISIONAL, mailbox=MAILBOX)
    assert first.later is not None
    await plane.close()
    async with asyncio.timeout(5):
        assert (await first.later).is_final


@pytest.mark.parametrize("scores", [NOT_FINITE, TIED])
async def test_a_flawed_answer_is_not_given_provisionally(scores: tuple[float, ...]) -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()))
    answer = await plane.ask(request_of(scores), call_with(), PROVISIONAL, mailbox=MAILBOX)
    assert (answer.tier, answer.is_final) == (Tier.HEAVY, True)


async def test_a_sure_answer_is_final_whatever_the_client_accepts() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()))
    assert (await plane.ask(request_of(SURE), call_with(), BOTH, mailbox=MAILBOX)).is_final


async def test_a_face_that_cannot_reply_twice_gets_one_answer() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()))
    response = await plane.infer(request_of(UNSURE, accept_provisional="1", deferrable="1"), call_with())
    assert response.parameters["tier"] == "heavy"


async def test_a_client_that_leaves_after_its_provisional_answer_cancels_the_escalation() -> None:
    heavy = GatedHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    first = await plane.ask(request_of(UNSURE), call_with(), PROVISIONAL, mailbox=MAILBOX)
    assert first.later is not None
    await asyncio.sleep(0)
    first.later.cancel()
    async with asyncio.timeout(5):
        await heavy.is_left.wait()


async def test_a_request_with_two_answers_is_counted_as_answered_once() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()))
    first = await plane.ask(request_of(UNSURE), call_with(), PROVISIONAL, mailbox=MAILBOX)
    assert first.later is not None
    await first.later
    usage = plane.metrics.usage()
    assert (usage.answered_edge, usage.answered_heavy) == (0, 1)


async def test_a_provisional_answer_is_counted_beside_the_request_and_is_an_event_of_its_span() -> None:
    tracing, exporter = recording()
    plane = await plane_with(echo_model(cascade=cascade_of()), tracing=tracing)
    first = await plane.ask(request_of(UNSURE), call_with(), PROVISIONAL, mailbox=MAILBOX)
    assert first.later is not None
    await first.later
    [root] = [span for span in exporter.get_finished_spans() if span.name == "infer digits"]
    assert [event.name for event in root.events] == ["provisional answer"]
    assert root.start_time is not None
    assert root.end_time is not None
    assert root.start_time <= root.events[0].timestamp <= root.end_time
    assert root.attributes is not None
    assert root.attributes["nanofleet.tier"] == "heavy"
    assert plane.metrics._provisional.of("digits", "low_confidence").count == 1


async def test_a_deferred_answer_is_counted_and_says_so_on_its_span() -> None:
    tracing, exporter = recording()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), tracing=tracing, deferrals=FakeDeferrals())
    await plane.ask(request_of(UNSURE), call_with(), DEFERRABLE, mailbox=MAILBOX)
    [root] = [span for span in exporter.get_finished_spans() if span.name == "infer digits"]
    assert root.attributes is not None
    assert root.attributes["nanofleet.deferred"] is True
    assert plane.metrics._provisional.of("digits", "heavy_unavailable").count == 1
    assert plane.metrics.usage().answered_edge == 1


async def test_a_deferrable_request_is_kept_for_a_heavy_tier_that_is_away() -> None:
    deferrals = FakeDeferrals()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), deferrals=deferrals)
    answer = await plane.ask(request_of(UNSURE, request_id="r1"), call_with(), DEFERRABLE, mailbox=MAILBOX)
    assert (answer.tier, answer.reason, answer.is_final, answer.later) == (
        Tier.EDGE,
        Reason.HEAVY_UNAVAILABLE,
        False,
        None,
    )
    [(request, dedupe_id, reply_to)] = deferrals.taken
    assert (request.model_name, request.id) == ("large", "r1")
    assert (dedupe_id, reply_to) == ("gate-1/camera-1/01", b"camera-1 low_confidence")


async def test_a_heavy_tier_that_is_known_to_be_out_of_reach_is_not_asked() -> None:
    heavy, deferrals = FakeHeavy(), FakeDeferrals()
    plane = await plane_with(
        echo_model(cascade=cascade_of()), heavy=heavy, deferrals=deferrals, is_reachable=lambda: False
    )
    answer = await plane.ask(request_of(UNSURE), call_with(), DEFERRABLE, mailbox=MAILBOX)
    assert (answer.reason, answer.is_final) == (Reason.HEAVY_UNAVAILABLE, False)
    assert heavy.asked == []
    assert len(deferrals.taken) == 1


async def test_a_heavy_tier_that_is_within_reach_again_is_asked() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()), is_reachable=lambda: True)
    assert (await plane.ask(request_of(UNSURE), call_with())).tier is Tier.HEAVY


async def test_without_room_for_a_deferral_the_edges_answer_is_final() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), deferrals=FakeDeferrals(room=0))
    answer = await plane.ask(request_of(UNSURE), call_with(), DEFERRABLE, mailbox=MAILBOX)
    assert (answer.reason, answer.is_final) == (Reason.HEAVY_UNAVAILABLE, True)


async def test_deferrals_that_fail_cost_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeDeferrals):
        def take(self, request: InferRequest, *, dedupe_id: str, reply_to: bytes) -> bool:
            raise OSError("disk gone")

    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), deferrals=Broken())
    answer = await plane.ask(request_of(UNSURE), call_with(), DEFERRABLE, mailbox=MAILBOX)
    assert answer.is_final
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("terms", [Terms("camera-1"), PROVISIONAL])
async def test_what_is_not_deferrable_is_not_kept(terms: Terms) -> None:
    deferrals = FakeDeferrals()
    plane = await plane_with(echo_model(cascade=cascade_of()), deferrals=deferrals, is_reachable=lambda: False)
    assert (await plane.ask(request_of(UNSURE), call_with(), terms, mailbox=MAILBOX)).is_final
    assert deferrals.taken == []


@pytest.mark.parametrize("privacy", ["device", "site"])
async def test_private_data_are_never_deferred(privacy: str) -> None:
    deferrals = FakeDeferrals()
    plane = await plane_with(
        echo_model(cascade=cascade_of()), heavy=away(), deferrals=deferrals, is_reachable=lambda: False
    )
    terms = Terms("camera-1", privacy=privacy, is_deferrable=True)
    answer = await plane.ask(request_of(UNSURE), call_with(), terms, mailbox=MAILBOX)
    assert (answer.reason, answer.is_final) == (Reason.PRIVACY, True)
    assert deferrals.taken == []


async def test_a_request_that_the_heavy_tier_had_no_time_for_is_not_deferred() -> None:
    deferrals = FakeDeferrals()
    heavy = FakeHeavy(DeadlineExceeded("heavy tier: too little time"))
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy, deferrals=deferrals)
    answer = await plane.ask(request_of(UNSURE), call_with(), DEFERRABLE, mailbox=MAILBOX)
    assert (answer.reason, answer.is_final) == (Reason.DEADLINE, True)
    assert deferrals.taken == []


async def test_a_flawed_answer_is_refused_and_not_deferred() -> None:
    deferrals = FakeDeferrals()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), deferrals=deferrals)
    with pytest.raises(HeavyUnavailable, match="not_finite"):
        await plane.ask(request_of(NOT_FINITE), call_with(), DEFERRABLE, mailbox=MAILBOX)
    assert deferrals.taken == []


async def test_after_a_provisional_answer_a_heavy_tier_that_fails_leads_to_a_deferral() -> None:
    deferrals = FakeDeferrals()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), deferrals=deferrals)
    first = await plane.ask(request_of(UNSURE), call_with(), BOTH, mailbox=MAILBOX)
    assert first.later is not None
    second = await first.later
    assert (first.reason, second.reason) == (Reason.LOW_CONFIDENCE, Reason.HEAVY_UNAVAILABLE)
    assert (second.is_final, second.later) == (False, None)
    assert len(deferrals.taken) == 1
