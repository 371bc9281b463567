"""What can be seen of a model's runs while it serves: how many, how many failed, how many gave no numbers, how long.

`Watch` stands in for a model's `run` for as long as somebody wants to know; a model that nobody watches costs nothing.
It is called in the loop or on the model's thread, one run at a time; reading needs no lock.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from core.errors import InvalidRequest
from core.tensors import Array

Run = Callable[[Sequence[Array]], Sequence[Array]]
# Chosen: enough for a 95th percentile, and it forgets what the first second was like.
_REMEMBERED_RUNS = 256


@dataclass(frozen=True, slots=True)
class Vitals:
    """`p95_s` is of one row where runs are shared, and None before the first run."""

    runs: int = 0
    failed_runs: int = 0
    non_finite_runs: int = 0
    p95_s: float | None = None


class Watch:
    """Runs the model and takes note; `stop` gives the model its own `run` back."""

    def __init__(self, run: Run, *, now_s: Callable[[], float], shares_runs: bool, on_stop: Callable[[], None]) -> None:
        self._run = run
        self._now_s = now_s
        self._shares_runs = shares_runs
        self._on_stop = on_stop
        self._runs = self._failed_runs = self._non_finite_runs = 0
        self._times_s: deque[float] = deque(maxlen=_REMEMBERED_RUNS)

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        started_s = self._now_s()
        try:
            outputs = self._run(inputs)
        except InvalidRequest:
            # The caller's fault, which says nothing about the model.
            raise
        except Exception:
            self._runs += 1
            self._failed_runs += 1
            raise
        rows = inputs[0].shape[0] if self._shares_runs else 1
        self._times_s.append((self._now_s() - started_s) / max(1, rows))
        self._runs += 1
        if not _are_finite(outputs) and _are_finite(inputs):
            self._non_finite_runs += 1
        return outputs

    def stop(self) -> None:
        self._on_stop()

    def vitals(self) -> Vitals:
        times_s = sorted(self._times_s.copy())
        p95_s = times_s[int(0.95 * (len(times_s) - 1))] if times_s else None
        return Vitals(self._runs, self._failed_runs, self._non_finite_runs, p95_s)


def _are_finite(arrays: Sequence[Array]) -> bool:
    return all(array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in arrays)
