"""Which models wait after a failure, for how long, and which are given up. Pure but for the jitter it is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import random

from core.backoff import Backoff, BackoffPolicy
from core.errors import NanofleetError
from core.fleet_state import Problem
from core.ids import ModelName


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Failures that may pass are tried for ever, `max_attempts` times before it is said and the pace is `cap_s`.

    Others are tried once.
    """

    max_attempts: int = 5
    base_s: float = 0.5
    cap_s: float = 30.0


class Attempts:
    """The failures of one round of work on a desired state; every error ends in exactly one of waiting or given up."""

    def __init__(self, policy: RetryPolicy, *, uniform: Callable[[], float] = random) -> None:
        self._max_attempts = policy.max_attempts
        self._pace = BackoffPolicy(base_s=policy.base_s, cap_s=policy.cap_s)
        self._uniform = uniform
        self.clear()

    def clear(self) -> None:
        self._failures: dict[ModelName, int] = {}
        self._backoffs: dict[ModelName, Backoff] = {}
        self._due_s: dict[ModelName, float] = {}
        self._most_stored_bytes: dict[ModelName, int] = {}
        self._persistent: dict[ModelName, Problem] = {}
        self._given_up: dict[ModelName, Problem] = {}

    @property
    def given_up(self) -> Mapping[ModelName, Problem]:
        """Return the models that are not tried again in this round."""
        return self._given_up

    def persistent(self, now_s: float) -> Mapping[ModelName, Problem]:
        """Return the models that have used up their attempts, and wait to be tried on at the slow pace."""
        return {model: problem for model, problem in self._persistent.items() if self._due_s[model] > now_s}

    def failed(self, model: ModelName, error: NanofleetError, *, now_s: float) -> None:
        self._failures[model] = self._failures.get(model, 0) + 1
        problem = Problem(error.code, str(error))
        if not error.retryable:
            self._forget(model)
            self._given_up[model] = problem
        elif self._failures[model] >= self._max_attempts:
            self._persistent[model] = problem
            self._due_s[model] = now_s + self._pace.cap_s * (1 + self._uniform()) / 2
        else:
            backoff = self._backoffs.setdefault(model, Backoff(self._pace, uniform=self._uniform))
            self._due_s[model] = now_s + backoff.next_delay_s()

    def progressed(self, model: ModelName, stored_bytes: int) -> None:
        """Note that there are so many bytes of the variant now; more than ever before are worth new attempts."""
        if stored_bytes > self._most_stored_bytes.get(model, 0):
            self._most_stored_bytes[model] = stored_bytes
            self._forget(model)

    def on_hold(self, now_s: float) -> frozenset[ModelName]:
        """Return the models that no step may touch now."""
        return frozenset(self._given_up) | {model for model, due_s in self._due_s.items() if due_s > now_s}

    def next_due_s(self, now_s: float) -> float | None:
        """Return when the next waiting model may be tried again; None when none waits."""
        return min((due_s for due_s in self._due_s.values() if due_s > now_s), default=None)

    def has_hope(self, now_s: float) -> bool:
        """Say whether a waiting model has attempts left before its failure is said."""
        return any(model not in self._persistent for model, due_s in self._due_s.items() if due_s > now_s)

    def _forget(self, model: ModelName) -> None:
        self._persistent.pop(model, None)
        self._due_s.pop(model, None)
        self._backoffs.pop(model, None)
        self._failures.pop(model, None)
