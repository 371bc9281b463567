"""What became of every request of a soak: pure bookkeeping, told of sendings and replies by those who make them.

A request is known by what its device calls it, so a second reply, a late one and one that never came show. Windows in
which no answer could come (the broker was away) excuse a loss and nothing else.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from statistics import median

# How long after its deadline a request is looked at again before it is judged: what comes late has come by then.
GRACE_S = 30.0
# Enough for a robust line, few enough for all of their pairs.
_MAX_POINTS = 240


@dataclass(slots=True)
class Asked:
    """One request; all times are of the clock on which it was asked."""

    kind: str
    sent_s: float
    deadline_s: float
    # False for those that may be dropped (hostile ones), or whose device is slow by purpose.
    must_be_answered: bool = True
    # Only MQTT 5 and calls say since when the time runs.
    is_timed: bool = True
    copies: int = 0
    replies: int = 0
    final_status: str = ""
    late_replies: int = 0
    # Spans that served it, of requests that are traced: more than one stands for more than one execution.
    spans: set[str] = field(default_factory=set)
    # The edge has answered and promised the heavy tier's verdict for when that is back.
    is_deferred: bool = False
    has_verdict: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    status: str
    is_final: bool = True
    reason: str = ""
    span: str | None = None


class Record:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.by_kind: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        # Who, for a person to look at.
        self.lost: list[str] = []
        self.late: list[str] = []
        # When nobody could be answered over the broker; the last may be open.
        self.outages: list[tuple[float, float]] = []
        self._open: dict[str, Asked] = {}

    def ask(self, name: str, asked: Asked) -> None:
        self.counts["sent"] += 1
        self.by_kind[asked.kind] += 1
        self._open[name] = asked

    def copied(self, name: str) -> None:
        """Note that a device has sent a request again."""
        if name in self._open:
            self._open[name].copies += 1
            self.counts["copies"] += 1

    def reply(self, name: str, reply: Reply, *, now_s: float) -> None:
        asked = self._open.get(name)
        if asked is None:
            self.counts["strangers"] += 1
            return
        asked.replies += 1
        if reply.span is not None:
            asked.spans.add(reply.span)
        if asked.is_deferred and reply.is_final and now_s > asked.deadline_s:
            asked.has_verdict = True
            return
        if now_s > asked.deadline_s:
            asked.late_replies += 1
            if asked.is_timed:
                self.late.append(f"{asked.kind} {name}: {now_s - asked.deadline_s:.3f} s")
        if reply.is_final:
            asked.final_status = asked.final_status or reply.status
        elif reply.reason == "heavy_unavailable":
            asked.is_deferred = True

    def begin_outage(self, now_s: float) -> None:
        self.outages.append((now_s, inf))

    def end_outage(self, now_s: float) -> None:
        self.outages[-1] = (self.outages[-1][0], now_s)

    @property
    def waiting_for_verdicts(self) -> int:
        return sum(asked.is_deferred and not asked.has_verdict for asked in self._open.values())

    def judge(self, now_s: float, *, is_end: bool = False) -> None:
        """Count what is over and forget it; at the end everything is."""
        for name, asked in list(self._open.items()):
            waits = asked.is_deferred and not asked.has_verdict
            if is_end or (now_s > asked.deadline_s + GRACE_S and not waits):
                del self._open[name]
                self._count(name, asked)

    def _count(self, name: str, asked: Asked) -> None:
        counts = self.counts
        is_answered = asked.final_status != "" or asked.is_deferred
        counts["answered"] += is_answered
        counts["deferred"] += asked.is_deferred
        counts["verdicts"] += asked.has_verdict
        counts["verdicts_missing"] += asked.is_deferred and not asked.has_verdict
        counts["repeated_replies"] += max(0, asked.replies - 1)
        counts["traced_copies"] += asked.copies > 0 and len(asked.spans) > 0
        counts["second_executions_traced"] += max(0, len(asked.spans) - 1)
        counts["late" if asked.is_timed else "late_untimed"] += asked.late_replies
        self.statuses[asked.final_status or ("deferred" if asked.is_deferred else "none")] += 1
        if is_answered or not asked.must_be_answered:
            return
        if any(begin < asked.deadline_s and asked.sent_s < end for begin, end in self.outages):
            counts["excused"] += 1
        else:
            counts["lost"] += 1
            self.lost.append(f"{asked.kind} {name}")


def slope_per_10_min(samples: Sequence[tuple[float, float]]) -> float:
    """Return how much a figure grows in ten minutes, as a share of its middle: the median of all pairs' slopes.

    Source: Theil (1950), Sen (1968); up to 29 % of the samples may be anything.
    """
    points = samples[:: max(1, len(samples) // _MAX_POINTS)]
    slopes = [(late - early) / (later_s - sooner_s) for (sooner_s, early), (later_s, late) in combinations(points, 2)]
    return median(slopes) * 600 / median(value for _, value in points) if slopes else 0.0
