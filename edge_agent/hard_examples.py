"""The requests that the edge model was not sure enough of, for whoever collects them to train the next model from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.open_inference.messages import InferRequest, InferResponse
from core.tensors import Array
from edge_agent.cascade.confidence import Verdict
from edge_agent.cascade.policy import Privacy, Reason, Tier
from edge_agent.runtime.pool import LoadedModel


@dataclass(frozen=True, slots=True)
class HardExample:
    """One request that escalated, or should have; its arrays belong to nobody else, but are not to be changed."""

    model: LoadedModel
    request: InferRequest
    # Of the edge model.
    outputs: Sequence[Array]
    verdict: Verdict
    # Who answered in the end, and why; a flawed answer that was given to nobody has the tier edge.
    tier: Tier
    reason: Reason
    # The heavy tier's answer, when that came.
    heavy: InferResponse | None
    # `site` or `any`; one of `device` is never offered.
    privacy: Privacy


class HardExamples(Protocol):
    # How far above its cascade's threshold an answer is still of interest; 0: not at all.
    margin: float

    def offer(self, example: HardExample) -> None:
        """Look at one more; called in the loop, once for each request, after it was answered.

        One that the edge was sure enough of, within `margin`, has the reason `confident`.
        """
        ...
