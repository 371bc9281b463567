"""What comes back from the data plane: an answer, and whether another one follows."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import Forbidden, HeavyUnavailable, NanofleetError
from core.fleet_state import EnergyMethod
from core.open_inference.messages import InferResponse, ParameterValue
from core.span_log import Attribute
from edge_agent.cascade.confidence import Verdict
from edge_agent.cascade.policy import Privacy, Reason, Tier


@dataclass(frozen=True, slots=True)
class Answer:
    """A response and where it came from; `reason` says why that tier answered."""

    response: InferResponse
    tier: Tier
    reason: Reason
    # Of the edge model, also when the heavy tier answered.
    confidence: float | None = None
    # Of the span that served the request, if it is traced.
    traceparent: str | None = None
    # False: the heavy tier's verdict follows, through `later` or, hours after this, through a VerdictSink.
    is_final: bool = True
    # The final verdict of a provisional answer, or a NanofleetError; whoever cancels it leaves.
    later: "asyncio.Future[Answer] | None" = None
    # Given before to the same request, and not worked out anew.
    is_cached: bool = False
    # Joules that an answer of this agent took on average over the last minute, where RAPL measures them.
    measured_j: float | None = None


def particulars(answer: Answer) -> dict[str, ParameterValue]:
    """Return what only some answers have to say, as parameters of an Open Inference body."""
    said: dict[str, ParameterValue] = {}
    if answer.confidence is not None:
        said["confidence"] = round(answer.confidence, 4)
    if answer.is_cached:
        said["cache"] = "hit"
    if answer.measured_j is not None:
        said["energy_mj"] = round(answer.measured_j * 1000, 3)
    return said


def tagged(answer: Answer) -> InferResponse:
    """Return the response with what is known of its origin among its parameters, for faces without other room."""
    response = answer.response
    parameters: dict[str, ParameterValue] = {
        **response.parameters,
        "tier": answer.tier.value,
        "reason": answer.reason.value,
        **particulars(answer),
    }
    return InferResponse(response.model_name, response.model_version, response.outputs, response.id, parameters)


def refusal(model: str, verdict: Verdict | None, reason: Reason) -> NanofleetError:
    """Return why a model's flawed answer is given to nobody."""
    flaw = "unusable" if verdict is None or verdict.flaw is None else verdict.flaw.value
    text = f"model {model}: its answer is {flaw} and"
    if reason is Reason.PRIVACY:
        return Forbidden(f"{text} the request's privacy class keeps it from the heavy tier")
    if reason is Reason.DEADLINE:
        return HeavyUnavailable(f"{text} too little time is left for the heavy tier; allow more")
    return HeavyUnavailable(f"{text} the heavy tier is away; try again later")


def span_attributes(answer: Answer, privacy: Privacy) -> Mapping[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "nanofleet.tier": answer.tier.value,
        "nanofleet.route.reason": answer.reason.value,
        "nanofleet.escalated": answer.tier is Tier.HEAVY,
        "nanofleet.privacy": privacy.value,
    }
    if not answer.is_final:
        attributes["nanofleet.deferred"] = True
    # It follows from the payload.
    if answer.confidence is not None and privacy is not Privacy.DEVICE:
        attributes["nanofleet.confidence"] = answer.confidence
    if answer.is_cached:
        attributes["nanofleet.cache"] = "hit"
    if answer.measured_j is not None:
        attributes["nanofleet.energy.method"] = EnergyMethod.RAPL.value
    return attributes
