"""Hard examples of the echo model: what the data plane would offer, without running it."""

from datetime import UTC, datetime

import numpy as np

from core.open_inference.messages import InferRequest, InferResponse
from core.sample_file import SampleTensors, SampleView, encode_sample
from core.tensors import Datatype, Tensor
from edge_agent.cascade.confidence import Verdict, judge_for
from edge_agent.cascade.policy import Privacy, Reason, Tier
from edge_agent.hard_examples import HardExample
from tests.support.edge_plane import UNSURE, cascade_of, echo_model

TAKEN_AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def scores(values: tuple[float, ...], name: str = "scores") -> Tensor:
    return Tensor(name, Datatype.FP32, np.array([values], np.float32))


def hard_example(
    values: tuple[float, ...] = UNSURE,
    *,
    model: str = "digits",
    heavy: tuple[float, ...] | None = None,
    privacy: Privacy = Privacy.ANY,
    reason: Reason = Reason.LOW_CONFIDENCE,
    request_id: str = "r1",
) -> HardExample:
    """Return the example of a request whose edge answer is `values`, and what the heavy tier said, if it did."""
    cascade = cascade_of()
    given = scores(values, "x")
    verdict: Verdict = judge_for(cascade)(given.array)[0]
    answer = None if heavy is None else InferResponse("large", "7", (scores(heavy),))
    return HardExample(
        echo_model(model, cascade=cascade),
        InferRequest(model, (given,), id=request_id),
        (given.array,),
        verdict,
        Tier.EDGE if heavy is None else Tier.HEAVY,
        reason,
        answer,
        privacy,
    )


def made_file(
    *,
    model: str = "digits",
    label: int | None = 1,
    reason: str = "low_confidence",
    privacy: str = "any",
    taken_at: datetime = TAKEN_AT,
    mark: float = 0.0,
    size: int = 3,
) -> tuple[SampleView, bytes]:
    """Return a sample and its bytes, which `mark` makes different from others."""
    view = SampleView(
        taken_at=taken_at,
        model=model,
        version="3",
        variant="int8-static",
        manifest="sha256:" + "0" * 64,
        reason=reason,
        tier="edge",
        privacy=privacy,
        confidence=0.5,
        flaw=None,
        label=label,
        heavy_label=None,
        heavy_model=None,
        tensors=(),
    )
    array = np.random.default_rng(int(mark * 1000)).random((1, size)).astype(np.float32)
    return view, encode_sample(view, SampleTensors((Tensor("x", Datatype.FP32, array),), ()))
