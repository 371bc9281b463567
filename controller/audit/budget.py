"""How many refusals are recorded: what an attacker can make happen at will must not fill the record.

The generic cell rate algorithm (ITU-T I.371), as in `controller.access.attempts`, but per culprit: everybody without a
name shares one budget, every operator has one.
"""

from collections import OrderedDict

# Chosen: a person's mistakes all stand there; a script's are counted.
BURST = 20
REFILL_S = 30.0
# Chosen: more operators than anybody has.
MAX_CULPRITS = 1024


class RefusalBudget:
    def __init__(self) -> None:
        self._paid_s: OrderedDict[str, float] = OrderedDict()
        self._left_out: dict[str, int] = {}

    def take(self, culprit: str, *, now_s: float) -> int | None:
        """Return how many of the culprit's refusals were left out before this one; None: leave this one out too."""
        debt_s = max(self._paid_s.get(culprit, now_s) - now_s, 0.0)
        if debt_s > (BURST - 1) * REFILL_S:
            self._left_out[culprit] = self._left_out.get(culprit, 0) + 1
            return None
        self._paid_s[culprit] = now_s + debt_s + REFILL_S
        self._paid_s.move_to_end(culprit)
        if len(self._paid_s) > MAX_CULPRITS:
            forgotten, _ = self._paid_s.popitem(last=False)
            self._left_out.pop(forgotten, None)
        return self._left_out.pop(culprit, 0)
