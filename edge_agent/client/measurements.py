"""How long an agent takes, from what was measured: probes for the way to it, answers for the way and the work."""

from collections import deque

# Weight of the newest measurement; chosen: five of them turn the mean.
_ANSWER_WEIGHT = 0.2
_PROBE_WEIGHT = 0.3
# Answers whose largest are told from the usual ones; chosen: a percentile of fewer says nothing.
_WINDOW = 128
_MIN_FOR_PERCENTILE = 8
# An agent that was left because it was slow must get another chance: after this long its answers say nothing.
FORGOTTEN_AFTER_S = 30.0


class RoundTrips:
    """Of one agent, as one device sees it."""

    def __init__(self) -> None:
        # The way there and back, without any work; None: not measured.
        self.network_s: float | None = None
        self._answer_s: float | None = None
        self._answered_at_s = 0.0
        self._window: deque[float] = deque(maxlen=_WINDOW)

    def note_probe(self, round_trip_s: float) -> None:
        self.network_s = _smoothed(self.network_s, round_trip_s, _PROBE_WEIGHT)

    def note_answer(self, round_trip_s: float, *, now_s: float) -> None:
        self._answer_s = _smoothed(self.answer_s(now_s), round_trip_s, _ANSWER_WEIGHT)
        self._answered_at_s = now_s
        self._window.append(round_trip_s)

    def answer_s(self, now_s: float) -> float | None:
        """Return the smoothed time to an answer; None: none of late."""
        return self._answer_s if now_s - self._answered_at_s < FORGOTTEN_AFTER_S else None

    @property
    def slow_s(self) -> float | None:
        """The 99th percentile of the last answers; None: too few."""
        if len(self._window) < _MIN_FOR_PERCENTILE:
            return None
        ordered = sorted(self._window)
        return ordered[(len(ordered) * 99) // 100]


def _smoothed(mean_s: float | None, newest_s: float, weight: float) -> float:
    return newest_s if mean_s is None else mean_s + weight * (newest_s - mean_s)
