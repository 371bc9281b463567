"""Which agent is asked first, and for how long it is waited for: pure, from what is known of each.

Agents that answer come before silent ones, those that take more before those that do not, those that have the model in
memory before those that must load it; among equals the nearest. Where nothing tells two agents apart, each device has
an order of its own, so that the devices of a site spread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# In an agent's place: whichever of the site takes it.
ANY_AGENT = "any"
# An agent that is asked already is left only for one that is clearly nearer; chosen, against going to and fro.
_STAY_RATIO = 1.25
_STAY_S = 0.001
# Chosen: an answer may take twice what all but one in a hundred took, and on any machine a quarter of a second: asking
# a second agent costs its work.
_PATIENCE_RATIO = 2.0
MIN_PATIENCE_S = 0.25
# The time left is shared by the agent asked and so many others at most; chosen: two more chances are enough.
_MAX_SHARES = 3


@dataclass(frozen=True, slots=True)
class Sight:
    """One agent that has the model, as one device sees it; times None where nothing was measured."""

    agent: str
    # The way there and back.
    network_s: float | None = None
    # The way and the work, of late.
    answer_s: float | None = None
    # 99th percentile of the answers.
    slow_s: float | None = None
    has_room: bool = True
    is_loaded: bool = True
    # It did not answer the last time.
    is_silent: bool = False
    # It asked not to be asked before.
    free_from_s: float = 0.0


def ranked(
    sights: Sequence[Sight], *, current: str | None, spread: Callable[[str], float], now_s: float
) -> list[Sight]:
    """Return the agents in the order in which to ask them; `current` was asked last."""
    work_s = _mean_work_s(sights)
    costs = {sight.agent: _cost_s(sight, work_s) for sight in sights}
    ordered = sorted(sights, key=lambda sight: (_group(sight, now_s), costs[sight.agent], spread(sight.agent)))
    for at, sight in enumerate(ordered):
        if sight.agent == current and _is_near_enough(sight, ordered[0], costs, now_s):
            return [sight, *ordered[:at], *ordered[at + 1 :]]
    return ordered


def patience_s(sight: Sight, *, left_s: float, others: int) -> float:
    """Return how long to wait for an agent before `others` are asked too, of the time `left_s`."""
    share_s = left_s / min(1 + others, _MAX_SHARES)
    if not others or sight.slow_s is None:
        return share_s
    return min(share_s, max(MIN_PATIENCE_S, _PATIENCE_RATIO * sight.slow_s))


def _group(sight: Sight, now_s: float) -> tuple[bool, float, bool, bool]:
    free_from_s = sight.free_from_s if sight.free_from_s > now_s else 0.0
    return sight.is_silent, free_from_s, not sight.has_room, not sight.is_loaded


def _is_near_enough(sight: Sight, best: Sight, costs: dict[str, float], now_s: float) -> bool:
    is_equal = _group(sight, now_s) == _group(best, now_s)
    return is_equal and costs[sight.agent] <= costs[best.agent] * _STAY_RATIO + _STAY_S


def _mean_work_s(sights: Sequence[Sight]) -> float:
    """Return what answering takes beyond the way, where both are known: the guess for agents not asked of late."""
    known = [
        max(0.0, sight.answer_s - sight.network_s)
        for sight in sights
        if sight.answer_s is not None and sight.network_s is not None
    ]
    return sum(known) / len(known) if known else 0.0


def _cost_s(sight: Sight, work_s: float) -> float:
    if sight.answer_s is not None:
        return sight.answer_s
    return float("inf") if sight.network_s is None else sight.network_s + work_s
