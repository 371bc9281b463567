"""Which requests leave a trace although they were not sampled: those that failed, were escalated or were slow.

Sampling is decided first, and for most requests against a trace; what turns out worth one is kept all the same. An
escalation's trace begins before the next tier is asked, so that its spans join it; a failed or slow request is written
down afterwards, from times that were taken anyway. A rate for each reason, and for each code of errors, keeps an outage
from turning into full tracing, and one kind of trouble from hiding another.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from core.token_bucket import Rate, TokenBucket

# On the first span of a request in each process.
KEEP_ATTRIBUTE = "nanofleet.keep"
# Chosen: the first requests of an incident are kept whatever the rate.
KEEP_BURST = 10
# Derived: the codes of core.errors, the other reasons, and room for defects; it only bounds the memory.
_MAX_KINDS = 64


class Keep(StrEnum):
    """Why a trace is there: the sampling decision, or what became of a request that it had left out."""

    SAMPLED = "sampled"
    ERROR = "error"
    ESCALATED = "escalated"
    SLOW = "slow"


@dataclass(frozen=True, slots=True)
class KeepRule:
    """`slow_s`: seconds from which on a request is slow; `per_s`: traces a second for each reason, 0 for none."""

    slow_s: float = math.inf
    per_s: float = 0.0


KEEP_NOTHING = KeepRule()


class Keeper:
    """Decides for one process; `slow_s` is public because the hot path compares with it and nothing else."""

    def __init__(self, rule: KeepRule) -> None:
        self.slow_s = rule.slow_s if rule.per_s > 0 else math.inf
        self._rate = Rate(rule.per_s, KEEP_BURST)
        self._buckets: dict[str, TokenBucket] = {}

    def permits(self, keep: Keep, *, now_s: float, error_type: str = "") -> bool:
        """Say whether one more trace may be kept for this reason, and count it."""
        if self._rate.per_s <= 0:
            return False
        kind = error_type or keep.value
        bucket = self._buckets.get(kind)
        if bucket is None:
            if len(self._buckets) >= _MAX_KINDS:
                return False
            bucket = self._buckets[kind] = TokenBucket(self._rate, now_s=now_s)
        return bucket.take(now_s)
