"""Outputs that carry no confidence escalate by rule, whatever their shape, and reach no client from the edge."""

from collections.abc import Sequence

import numpy as np
import pytest

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import Forbidden, HeavyUnavailable
from core.open_inference.service import Call
from core.tensors import Array, Datatype, TensorSpec
from edge_agent.cascade.confidence import are_shaped
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.runtime.pool import LoadedModel
from edge_agent.runtime.session import RunTime
from edge_agent.settings import RuntimeSettings
from tests.support.edge_plane import SURE, away, cascade_of, echo_manifest, plane_with, request_of

FLOAT = np.float32
FLAWED: dict[str, tuple[Array, Reason]] = {
    "nan": (np.array([[np.nan, 1, 0]], FLOAT), Reason.NOT_FINITE),
    "infinity": (np.array([[np.inf, 1, 0]], FLOAT), Reason.NOT_FINITE),
    "all nan": (np.full((1, 3), np.nan, FLOAT), Reason.NOT_FINITE),
    "tied": (np.array([[1, 1, 0]], FLOAT), Reason.TIED),
    "all equal": (np.zeros((1, 3), FLOAT), Reason.TIED),
    "no classes": (np.zeros((1, 0), FLOAT), Reason.EMPTY),
    "no rows": (np.zeros((0, 3), FLOAT), Reason.EMPTY),
    "nothing": (np.zeros(0, FLOAT), Reason.EMPTY),
    "a scalar": (np.array(5, FLOAT), Reason.MALFORMED),
    "one class": (np.ones((1, 1), FLOAT), Reason.MALFORMED),
    "text": (np.array([[b"a", b"b", b"c"]], object), Reason.MALFORMED),
    "truth values": (np.array([[True, False, False]]), Reason.MALFORMED),
    "too few classes": (np.array([[9, 0]], FLOAT), Reason.MALFORMED),
    "too many classes": (np.array([[9, 0, 0, 0]], FLOAT), Reason.MALFORMED),
    "too many dimensions": (np.array([[[9, 0, 0]]], FLOAT), Reason.MALFORMED),
    "too few dimensions": (np.array([9, 0, 0], FLOAT), Reason.MALFORMED),
    "another row than asked": (np.array([[9, 0, 0], [9, 0, 0]], FLOAT), Reason.MALFORMED),
}
CASES = pytest.mark.parametrize(("scores", "reason"), list(FLAWED.values()), ids=list(FLAWED))


def model_of(scores: Array, *, max_batch: int = 8) -> LoadedModel:
    """A model that says `scores` to every request."""
    manifest = echo_manifest(cascade=cascade_of(), max_batch=max_batch)

    def run(inputs: Sequence[Array]) -> Sequence[Array]:
        return [scores]

    return LoadedModel(
        manifest,
        manifest.digest(),
        run,
        run_time=RunTime(0.0, 0.0),
        settings=RuntimeSettings(),
        clock=SystemClock(),
    )


def specs(*shapes: tuple[int, ...]) -> list[TensorSpec]:
    return [TensorSpec("scores", Datatype.FP32, shape) for shape in shapes]


def call_with(seconds: float = 5.0) -> Call:
    return Call(Deadline.after(seconds, now_s=SystemClock().monotonic_s()))


@CASES
async def test_a_flawed_output_escalates_for_that_reason(scores: Array, reason: Reason) -> None:
    plane = await plane_with(model_of(scores))
    answer = await plane.ask(request_of(SURE), call_with())
    assert (answer.tier, answer.reason, answer.confidence) == (Tier.HEAVY, reason, None)


@CASES
async def test_a_flawed_output_in_a_joint_run_escalates_for_each_request_in_it(scores: Array, reason: Reason) -> None:
    plane = await plane_with(model_of(scores))
    futures = [plane.ask(request_of(SURE), call_with()) for _ in range(3)]
    answers = [await future for future in futures]
    assert [(answer.tier, answer.confidence) for answer in answers] == [(Tier.HEAVY, None)] * 3
    # What is left of a vector that three requests share is nothing for two of them.
    assert {answer.reason for answer in answers} <= {reason, Reason.EMPTY}


@CASES
async def test_a_flawed_output_without_a_heavy_tier_is_refused(scores: Array, reason: Reason) -> None:
    plane = await plane_with(model_of(scores), heavy=away())
    with pytest.raises(HeavyUnavailable, match=reason.value):
        await plane.ask(request_of(SURE), call_with())


@CASES
async def test_a_flawed_output_of_private_data_is_refused_and_not_sent_away(scores: Array, reason: Reason) -> None:
    plane = await plane_with(model_of(scores))
    with pytest.raises(Forbidden, match=reason.value):
        await plane.ask(request_of(SURE, privacy="site"), call_with())


@pytest.mark.parametrize(
    ("found", "shape", "rows", "is_shaped"),
    [
        ((1, 3), (-1, 3), 1, True),
        ((2, 3), (-1, 3), 1, False),
        ((2, 3), (-1, 3), None, True),
        ((2, 3), (1, 3), None, False),
        ((1, 4), (-1, 3), 1, False),
        ((1, 9, 2), (-1, -1, 2), 1, True),
        ((1, 9, 3), (-1, -1, 2), 1, False),
        ((1, 9), (-1, -1, 2), 1, False),
        ((), (), None, True),
        ((), (-1,), 1, False),
        ((1,), (), None, False),
        ((), (), 1, False),
    ],
)
def test_a_shape_is_that_of_the_manifest(
    found: tuple[int, ...], shape: tuple[int, ...], rows: int | None, is_shaped: bool
) -> None:
    assert are_shaped([np.zeros(found, FLOAT)], specs(shape), rows=rows) is is_shaped


def test_every_output_counts_and_none_is_missing() -> None:
    good, bad = np.zeros((1, 3), FLOAT), np.zeros((1, 4), FLOAT)
    assert are_shaped([good, good], specs((-1, 3), (-1, 3)), rows=1)
    assert not are_shaped([good, bad], specs((-1, 3), (-1, 3)), rows=1)
    assert not are_shaped([good], specs((-1, 3), (-1, 3)), rows=1)


async def test_a_model_that_does_not_batch_may_have_any_first_dimension() -> None:
    plane = await plane_with(model_of(np.array([[9, 0, 0], [9, 0, 0]], FLOAT), max_batch=1))
    assert (await plane.ask(request_of(SURE), call_with())).reason is Reason.CONFIDENT
