"""What a span is about: the tier that did it, the stage of the request's way, and the model that was asked for.

    device   ask        the whole way, as whoever asked sees it
    edge     process    from arrival to reply; queue, compute and offload are inside
    gateway  infer      from arrival to reply; heavy, the call of the large model's replica, is inside
    heavy    infer      inside the replica; compute is inside

Derived from the names that each process gives its spans: `edge_agent.request_trace`, `edge_agent.client`,
`controller.gateway.dispatch`, `controller.heavy.protocol`.
"""

from enum import StrEnum
from typing import NamedTuple


class TierName(StrEnum):
    DEVICE = "device"
    EDGE = "edge"
    GATEWAY = "gateway"
    HEAVY = "heavy"


_TIERS = {
    "nanofleet-device": TierName.DEVICE,
    "nanofleet-agent": TierName.EDGE,
    "nanofleet-controller": TierName.GATEWAY,
    "nanofleet-heavy": TierName.HEAVY,
}
# The span that stands for a request in each tier; a face of the agent calls it `process` or `infer`.
WHOLE = "request"
_WHOLE_NAMES = frozenset({"ask", "process", "infer"})
_INNER = {
    TierName.DEVICE: frozenset[str](),
    TierName.EDGE: frozenset({"queue", "compute", "offload"}),
    TierName.GATEWAY: frozenset({"heavy"}),
    TierName.HEAVY: frozenset({"compute"}),
}


class Stage(NamedTuple):
    tier: TierName
    name: str


# Along the way of a request.
STAGES: tuple[Stage, ...] = tuple(
    Stage(tier, name)
    for tier, names in (
        (TierName.DEVICE, (WHOLE,)),
        (TierName.EDGE, (WHOLE, "queue", "compute", "offload")),
        (TierName.GATEWAY, (WHOLE, "heavy")),
        (TierName.HEAVY, (WHOLE, "compute")),
    )
    for name in names
)


def tier_of(service: str) -> TierName | None:
    """Return the tier that a process belongs to; None: it is not one of ours."""
    return _TIERS.get(service)


def stage_of(service: str, span_name: str) -> Stage | None:
    """Return the stage that a span is; None: it is none of those in STAGES."""
    tier = _TIERS.get(service)
    if tier is None:
        return None
    word, _, model = span_name.partition(" ")
    if model and word in _WHOLE_NAMES:
        return Stage(tier, WHOLE)
    return Stage(tier, span_name) if span_name in _INNER[tier] else None


def model_of(span_name: str) -> str | None:
    """Return the model that a request's span names; None: it is a stage inside, or none of ours."""
    word, _, model = span_name.partition(" ")
    return model or None if word in _WHOLE_NAMES else None
