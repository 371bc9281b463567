"""Who answers a request: the edge, the large model, or nobody. Pure: values in, a decision out.

The order is fixed: what must not be (privacy, no usable answer) before what is better (confidence). The reason is a
word from a small set; it stands in the reply, on the span and in the counters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum

from core.errors import Forbidden
from core.manifest import Cascade
from edge_agent.cascade.confidence import Verdict

# Chosen: one round trip to the gateway and a small model on Ray take a few milliseconds at best (measured p50 2.4 ms);
# with less time left than this, asking only spends the time that the reply needs.
MIN_OFFLOAD_S = 0.010


class Privacy(StrEnum):
    """Where a request's data may go; ordered from the strictest to the most open."""

    DEVICE = "device"
    SITE = "site"
    ANY = "any"


class Tier(StrEnum):
    EDGE = "edge"
    HEAVY = "heavy"


class Reason(StrEnum):
    """Why this tier answers, or why nobody does."""

    CONFIDENT = "confident"
    NO_CASCADE = "no_cascade"
    LOW_CONFIDENCE = "low_confidence"
    EMPTY = "empty"
    MALFORMED = "malformed"
    NOT_FINITE = "not_finite"
    TIED = "tied"
    PRIVACY = "privacy"
    DEADLINE = "deadline"
    HEAVY_UNAVAILABLE = "heavy_unavailable"


class Choice(Enum):
    ANSWER = "answer"
    ESCALATE = "escalate"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    choice: Choice
    reason: Reason


_STRICTEST_FIRST = tuple(Privacy)
_CONFIDENT = Decision(Choice.ANSWER, Reason.CONFIDENT)
_NO_CASCADE = Decision(Choice.ANSWER, Reason.NO_CASCADE)


def privacy_of(words: Iterable[object]) -> Privacy:
    """Return the strictest class among the words that a request carries; none means `any`.

    Raises:
        Forbidden: a word is no class; what is not understood must not leave (fail closed).
    """
    found = Privacy.ANY
    for word in words:
        try:
            privacy = Privacy(word)  # type: ignore[arg-type]  # any object: what is not a word of ours is refused
        except ValueError:
            raise Forbidden(f"privacy: expected device, site or any, got {str(word)[:80]!r}") from None
        found = strictest(found, privacy)
    return found


def strictest(*classes: Privacy) -> Privacy:
    """Return the strictest of the classes; there is at least one."""
    return min(classes, key=_STRICTEST_FIRST.index)


def decide(
    verdict: Verdict | None, *, cascade: Cascade | None, privacy: Privacy, remaining_s: float | None
) -> Decision:
    """Decide who answers after the edge model ran; `remaining_s` None means no deadline."""
    if cascade is None or verdict is None:
        return _NO_CASCADE
    if verdict.confidence is not None and verdict.confidence >= cascade.threshold:
        return _CONFIDENT
    if privacy is not Privacy.ANY:
        return fall_back(verdict, Reason.PRIVACY)
    if remaining_s is not None and remaining_s < MIN_OFFLOAD_S:
        return fall_back(verdict, Reason.DEADLINE)
    return Decision(Choice.ESCALATE, Reason.LOW_CONFIDENCE if verdict.flaw is None else Reason(verdict.flaw.value))


def fall_back(verdict: Verdict, reason: Reason) -> Decision:
    """Decide what becomes of an answer that should have escalated but cannot, for `reason`."""
    return Decision(Choice.ANSWER if verdict.flaw is None else Choice.REFUSE, reason)
