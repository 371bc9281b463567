"""Which hard examples are worth keeping: near the threshold, balanced over the predicted classes, so many an hour.

Pure: candidates and times in, choices out. In every hour each class of a model has a reservoir (Vitter 1985, algorithm
R): as long as the hour lasts, every candidate of the class so far has the same chance to be among those kept. When the
model's hour is full, a rare class takes the place of an example of the class that has most.

The hour is that of a monotonic clock; it begins with a model's first candidate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

HOUR_S = 3600.0
# Chosen: more models than an agent runs; beyond it the longest untouched hour is forgotten.
MAX_MODELS = 256


@dataclass(frozen=True, slots=True)
class Rules:
    # Largest distance of a confidence from the cascade's threshold, on either side of it.
    max_below: float = 1.0
    max_above: float = 0.0
    # Most examples of one predicted class, and of all of them, that one model keeps of an hour.
    max_per_class: int = 10
    max_per_hour: int = 100


class Candidate(NamedTuple):
    """`label` None: no class was predicted; `confidence` None: the outputs were flawed, which is always of interest."""

    model: str
    label: int | None
    confidence: float | None
    threshold: float


class Keep(NamedTuple):
    """Keep the candidate as `ticket`, in the place of an earlier one where `replaces` names it."""

    ticket: int
    replaces: int | None = None


class Refusal(StrEnum):
    """Why a candidate is not kept."""

    NOT_NEAR = "not_near"
    CLASS_LIMIT = "class_limit"
    HOUR_LIMIT = "hour_limit"


@dataclass(slots=True)
class _Class:
    seen: int = 0
    tickets: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Hour:
    began_s: float
    classes: dict[int | None, _Class] = field(default_factory=dict)
    kept: int = 0


class Selection:
    """One for all models of an agent."""

    def __init__(self, rules: Rules, *, below: Callable[[int], int]) -> None:
        """`below` returns a random number from 0 to its argument, without that."""
        self._rules = rules
        self._below = below
        self._hours: dict[str, _Hour] = {}
        self._tickets = 0

    @property
    def margin(self) -> float:
        return self._rules.max_above

    def consider(self, candidate: Candidate, *, now_s: float) -> Keep | Refusal:
        if not self._is_near(candidate):
            return Refusal.NOT_NEAR
        hour = self._hour(candidate.model, now_s)
        known = hour.classes.get(candidate.label) or _Class()
        if hour.kept < self._rules.max_per_hour and len(known.tickets) < self._rules.max_per_class:
            hour.kept += 1
            return self._kept(hour, candidate.label, known)
        if len(known.tickets) < self._rules.max_per_class and (fullest := _fuller(hour, than=known)) is not None:
            replaced = fullest.tickets.pop(self._below(len(fullest.tickets)))
            return self._kept(hour, candidate.label, known, replaced)
        return self._drawn(known)

    def _is_near(self, candidate: Candidate) -> bool:
        if candidate.confidence is None:
            return True
        above = candidate.confidence - candidate.threshold
        return -self._rules.max_below <= above <= self._rules.max_above

    def _hour(self, model: str, now_s: float) -> _Hour:
        hour = self._hours.get(model)
        if hour is None or not 0 <= now_s - hour.began_s < HOUR_S:
            # Behind the others, which keeps them in the order of their beginnings.
            self._hours.pop(model, None)
            hour = self._hours[model] = _Hour(now_s)
            if len(self._hours) > MAX_MODELS:
                del self._hours[next(iter(self._hours))]
        return hour

    def _kept(self, hour: _Hour, label: int | None, known: _Class, replaced: int | None = None) -> Keep:
        hour.classes[label] = known
        known.seen += 1
        known.tickets.append(self._ticket())
        return Keep(known.tickets[-1], replaced)

    def _drawn(self, known: _Class) -> Keep | Refusal:
        """Let the candidate into its class's reservoir with the chance that every one before it had."""
        if not known.tickets:
            return Refusal.HOUR_LIMIT
        known.seen += 1
        place = self._below(known.seen)
        if place >= len(known.tickets):
            full = len(known.tickets) >= self._rules.max_per_class
            return Refusal.CLASS_LIMIT if full else Refusal.HOUR_LIMIT
        replaced, known.tickets[place] = known.tickets[place], self._ticket()
        return Keep(known.tickets[place], replaced)

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets


def _fuller(hour: _Hour, *, than: _Class) -> _Class | None:
    """Return the class with most examples, the first of several, if one of them less would balance the two."""
    fullest = max(hour.classes.values(), key=lambda each: len(each.tickets))
    return fullest if len(fullest.tickets) > len(than.tickets) + 1 else None
