"""The one way of a request: admitted or refused, run, judged, and answered by the right tier."""

import asyncio
import math

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import (
    DeadlineExceeded,
    Forbidden,
    HeavyUnavailable,
    InvalidRequest,
    InvalidTensor,
    Overloaded,
    UnknownModel,
)
from core.open_inference.messages import InferRequest, InferResponse, RequestedOutput
from core.open_inference.service import Call
from core.telemetry import Tracing, TracingSettings
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.settings import RuntimeSettings
from edge_agent.terms import Terms
from tests.support.edge_plane import (
    SURE,
    UNSURE,
    FakeHeavy,
    away,
    cascade_of,
    echo_model,
    plane_with,
    request_of,
    scores_tensor,
)

NOT_FINITE = (math.nan, 1.0, 0.0)
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"


def call_with(seconds: float, *, traceparent: str | None = None) -> Call:
    return Call(Deadline.after(seconds, now_s=SystemClock().monotonic_s()), traceparent)


async def test_a_confident_model_answers_at_the_edge() -> None:
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    answer = await plane.answer(request_of(SURE, request_id="r1"))
    assert (answer.tier, answer.reason) == (Tier.EDGE, Reason.CONFIDENT)
    assert answer.response.id == "r1"
    assert answer.response.model_version == "3"
    assert answer.response.outputs[0].array.tolist() == [[0, 9, 0]]
    assert answer.confidence is not None
    assert answer.confidence > 0.99
    assert heavy.asked == []


async def test_an_unsure_model_hands_over_to_the_large_one() -> None:
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    answer = await plane.answer(request_of(UNSURE, request_id="r1"), call_with(5))
    assert (answer.tier, answer.reason) == (Tier.HEAVY, Reason.LOW_CONFIDENCE)
    assert (answer.response.model_name, answer.response.id) == ("large", "r1")
    assert [request.model_name for request in heavy.asked] == ["large"]


async def test_an_answer_that_is_not_finite_escalates_for_that_reason() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()))
    answer = await plane.answer(request_of(NOT_FINITE), call_with(5))
    assert (answer.tier, answer.reason, answer.confidence) == (Tier.HEAVY, Reason.NOT_FINITE, None)


async def test_with_the_heavy_tier_away_the_edge_answers_and_says_so() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away())
    answer = await plane.answer(request_of(UNSURE), call_with(5))
    assert (answer.tier, answer.reason) == (Tier.EDGE, Reason.HEAVY_UNAVAILABLE)
    assert answer.response.model_name == "digits"


async def test_an_unusable_answer_with_the_heavy_tier_away_is_an_error() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away())
    with pytest.raises(HeavyUnavailable, match="not_finite"):
        await plane.answer(request_of(NOT_FINITE), call_with(5))


async def test_a_request_that_the_heavy_tier_refuses_is_answered_at_the_edge() -> None:
    heavy = FakeHeavy(InvalidRequest("the large model takes another input"))
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    assert (await plane.answer(request_of(UNSURE), call_with(5))).tier is Tier.EDGE


async def test_with_too_little_time_for_the_heavy_tier_the_edge_answers_for_that_reason() -> None:
    heavy = FakeHeavy(DeadlineExceeded("heavy tier: too little time is left to ask it"))
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    answer = await plane.answer(request_of(UNSURE), call_with(5))
    assert (answer.tier, answer.reason) == (Tier.EDGE, Reason.DEADLINE)


async def test_a_defect_in_the_escalation_is_logged_and_the_edge_answers(caplog: pytest.LogCaptureFixture) -> None:
    class Defective(FakeHeavy):
        async def ask(
            self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
        ) -> InferResponse:
            raise ZeroDivisionError

    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=Defective())
    async with asyncio.timeout(5):
        answer = await plane.answer(request_of(UNSURE), call_with(5))
    assert (answer.tier, answer.reason) == (Tier.EDGE, Reason.HEAVY_UNAVAILABLE)
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None


async def test_private_data_stay_here() -> None:
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    answer = await plane.answer(request_of(UNSURE, privacy="site"), call_with(5))
    assert (answer.tier, answer.reason, heavy.asked) == (Tier.EDGE, Reason.PRIVACY, [])


async def test_the_word_beside_the_request_cannot_lower_its_privacy() -> None:
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    answer = await plane.ask(request_of(UNSURE, privacy="device"), call_with(5), Terms(privacy="any"))
    assert (answer.reason, heavy.asked) == (Reason.PRIVACY, [])


async def test_an_unknown_privacy_class_is_refused() -> None:
    plane = await plane_with(echo_model())
    with pytest.raises(Forbidden):
        await plane.answer(request_of(privacy="public"))


async def test_unusable_private_data_are_refused_and_not_sent_away() -> None:
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    with pytest.raises(Forbidden, match="privacy"):
        await plane.answer(request_of(NOT_FINITE, privacy="site"), call_with(5))
    assert heavy.asked == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((), "expected the inputs"),
        ((scores_tensor("y", SURE),), "expected the inputs"),
        ((scores_tensor("x", SURE), scores_tensor("x", SURE)), "expected the inputs"),
        ((scores_tensor("x", (1.0, 2.0)),), r"expected shape \[-1, 3\], got \[1, 2\]"),
    ],
)
async def test_inputs_that_do_not_fit_are_refused_with_what_was_expected(
    tensors: tuple[object, ...], message: str
) -> None:
    plane = await plane_with(echo_model())
    with pytest.raises(InvalidTensor, match=message):
        await plane.answer(InferRequest("digits", tensors))  # type: ignore[arg-type]  # parametrised


async def test_an_unknown_model_or_version_is_refused_with_what_there_is() -> None:
    plane = await plane_with(echo_model())
    with pytest.raises(UnknownModel, match="digits"):
        await plane.answer(request_of(model="letters"))
    with pytest.raises(UnknownModel, match="runs version 3"):
        await plane.answer(InferRequest("digits", (scores_tensor("x", SURE),), model_version="4"))


async def test_more_rows_than_the_model_allows_are_refused() -> None:
    plane = await plane_with(echo_model())
    tensor = scores_tensor("x", SURE)
    many = InferRequest("digits", (type(tensor)("x", tensor.datatype, tensor.array.repeat(9, axis=0)),))
    with pytest.raises(InvalidTensor, match="1 to 8 rows"):
        await plane.answer(many)


async def test_a_request_whose_deadline_has_passed_is_not_run() -> None:
    plane = await plane_with(echo_model())
    with pytest.raises(DeadlineExceeded):
        await plane.answer(request_of(), call_with(0))


async def test_a_full_queue_refuses() -> None:
    plane = await plane_with(echo_model(settings=RuntimeSettings(max_queue=1)))
    first = plane.ask(request_of())
    with pytest.raises(Overloaded):
        await plane.ask(request_of())
    await first


async def test_only_the_outputs_that_were_asked_for_come_back() -> None:
    plane = await plane_with(echo_model())
    asked = InferRequest("digits", (scores_tensor("x", SURE),), outputs=(RequestedOutput("scores"),))
    assert [tensor.name for tensor in (await plane.answer(asked)).response.outputs] == ["scores"]
    with pytest.raises(InvalidTensor, match="scores"):
        await plane.answer(InferRequest("digits", asked.inputs, outputs=(RequestedOutput("boxes"),)))


async def test_a_caller_who_leaves_cancels_the_escalation() -> None:
    class Endless(FakeHeavy):
        def __init__(self) -> None:
            super().__init__()
            self.started = asyncio.Event()
            self.cancelled = asyncio.Event()

        async def ask(
            self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
        ) -> InferResponse:
            self.started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            raise AssertionError

    heavy = Endless()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    answer = plane.ask(request_of(UNSURE), call_with(60))
    async with asyncio.timeout(5):
        await heavy.started.wait()
        answer.cancel()
        await heavy.cancelled.wait()


async def test_closing_ends_the_escalations_with_the_edges_answer_for_their_callers() -> None:
    class Endless(FakeHeavy):
        async def ask(
            self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
        ) -> InferResponse:
            await asyncio.Event().wait()
            raise AssertionError

    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=Endless())
    answer = plane.ask(request_of(UNSURE), call_with(60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await plane.close()
    assert ((await answer).tier, (await answer).reason) == (Tier.EDGE, Reason.HEAVY_UNAVAILABLE)


async def test_the_data_plane_face_tells_tier_and_reason_as_parameters() -> None:
    plane = await plane_with(echo_model(cascade=cascade_of()))
    response = await plane.infer(request_of(SURE), Call())
    assert response.parameters["tier"] == "edge"
    assert response.parameters["reason"] == "confident"


async def test_it_describes_what_it_runs() -> None:
    plane = await plane_with(echo_model())
    assert await plane.is_ready()
    assert [(entry.name, entry.version, entry.state) for entry in await plane.index()] == [("digits", "3", "READY")]
    metadata = await plane.metadata("digits", "")
    assert (metadata.versions, metadata.inputs[0].shape) == (("3",), (-1, 3))
    assert await plane.is_model_ready("digits", "3")


def recording(sample_ratio: float = 0.0) -> tuple[Tracing, InMemorySpanExporter]:
    tracing = Tracing("test", TracingSettings(endpoint=None, sample_ratio=sample_ratio))
    exporter = InMemorySpanExporter()
    tracing._provider.add_span_processor(SimpleSpanProcessor(exporter))
    return tracing, exporter


async def test_a_sampled_request_leaves_one_tree_of_spans_and_its_answer_names_the_root() -> None:
    tracing, exporter = recording()
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy, tracing=tracing)
    answer = await plane.answer(request_of(UNSURE), call_with(5, traceparent=SAMPLED))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"infer digits", "queue", "compute", "offload"}
    root = spans["infer digits"]
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    for child in ("queue", "compute", "offload"):
        parent = spans[child].parent
        assert parent is not None
        assert parent.span_id == root.context.span_id
    assert answer.traceparent is not None
    assert answer.traceparent.split("-")[2] == f"{root.context.span_id:016x}"
    assert heavy.traceparents[0] is not None
    assert heavy.traceparents[0].split("-")[2] == f"{spans['offload'].context.span_id:016x}"
    assert root.attributes is not None
    assert root.attributes["nanofleet.tier"] == "heavy"
    assert root.attributes["nanofleet.route.reason"] == "low_confidence"
    assert root.attributes["nanofleet.escalated"] is True
    assert root.attributes["nanofleet.keep"] == "sampled"


async def test_the_times_on_the_spans_are_those_of_the_request() -> None:
    tracing, exporter = recording(1.0)
    plane = await plane_with(echo_model(), tracing=tracing)
    await plane.answer(request_of())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    root, queue, compute = spans["infer digits"], spans["queue"], spans["compute"]
    times = (root.start_time, queue.end_time, compute.start_time, compute.end_time, root.end_time)
    assert all(time is not None for time in times)
    assert list(times) == sorted(times, key=lambda time: time or 0)


async def test_an_unsampled_request_leaves_no_span_and_hands_its_context_on() -> None:
    tracing, exporter = recording(1.0)
    heavy = FakeHeavy()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy, tracing=tracing)
    answer = await plane.answer(request_of(UNSURE), call_with(5, traceparent=UNSAMPLED))
    assert exporter.get_finished_spans() == ()
    assert answer.traceparent is None
    assert heavy.traceparents == [UNSAMPLED]


async def test_a_sampled_request_that_is_refused_has_an_error_on_its_span() -> None:
    tracing, exporter = recording()
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=away(), tracing=tracing)
    with pytest.raises(HeavyUnavailable):
        await plane.answer(request_of(NOT_FINITE), call_with(5, traceparent=SAMPLED))
    root = next(span for span in exporter.get_finished_spans() if span.name == "infer digits")
    assert root.attributes is not None
    assert root.attributes["error.type"] == "unavailable"


async def test_a_measured_figure_is_said_with_the_edge_s_answers_and_its_method_on_the_span() -> None:
    tracing, exporter = recording()
    plane = await plane_with(echo_model(cascade=cascade_of()), tracing=tracing)
    plane.note_energy(0.002)
    answer = await plane.answer(request_of(SURE), call_with(5, traceparent=SAMPLED))
    assert answer.measured_j == 0.002
    root = next(span for span in exporter.get_finished_spans() if span.name == "infer digits")
    assert root.attributes is not None
    assert root.attributes["nanofleet.energy.method"] == "rapl"
    plane.note_energy(None)
    assert (await plane.answer(request_of(SURE), call_with(5))).measured_j is None


@pytest.mark.parametrize("obstacle", [Reason.DEADLINE, Reason.HEAVY_UNAVAILABLE])
async def test_a_heavy_tier_that_is_not_worth_asking_is_not_asked(obstacle: Reason) -> None:
    heavy = FakeHeavy()
    heavy.known_obstacle = obstacle
    plane = await plane_with(echo_model(cascade=cascade_of()), heavy=heavy)
    answer = await plane.answer(request_of(UNSURE), call_with(5))
    assert (answer.tier, answer.reason) == (Tier.EDGE, obstacle)
    assert heavy.asked == []
