"""How old things are, whatever happens to the wall clock: seconds on an axis of the outbox's own, which never jumps.

Within a process the monotonic clock says how far it has come. Over a restart of the process, the boot clock does, as
long as the machine did not start anew in between (`/proc/sys/kernel/random/boot_id`). Only over a restart of the
machine must the wall clock be asked, and what it says is believed within bounds: never backwards, and at most a day,
so that a clock that wakes up a year ahead cannot make everything old at once. One that wakes up in the past makes
nothing old, and the bounds on rows and bytes still hold.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core.clock import Clock

# Chosen: longer than a night without power; what waits a week at most is then shed after a fortnight at worst.
MAX_OFF_S = 86_400.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Anchor(NamedTuple):
    """Where the axis stood when it was last written down."""

    age_s: float
    wall_s: float
    boot_id: str
    boot_s: float


@dataclass(frozen=True, slots=True)
class Boot:
    """This start of the machine, and the seconds since, with the time that it slept."""

    boot_id: str
    elapsed_s: Callable[[], float]


def this_boot() -> Boot:
    """Return what the kernel says; a kernel that says nothing makes every start of a process one of the machine."""
    try:
        boot_id = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        boot_id = ""
    return Boot(boot_id, lambda: time.clock_gettime(time.CLOCK_BOOTTIME))


class AgeClock:
    """Goes on from `anchor`; None: begins at zero."""

    def __init__(self, anchor: Anchor | None, *, clock: Clock, boot: Boot) -> None:
        self._clock = clock
        self._boot = boot
        self._base_s = 0.0 if anchor is None else anchor.age_s + self._off_s(anchor)
        self._started_s = clock.monotonic_s()

    def now_s(self) -> float:
        return self._base_s + self._clock.monotonic_s() - self._started_s

    def anchor(self) -> Anchor:
        return Anchor(self.now_s(), self._clock.now().timestamp(), self._boot.boot_id, self._boot.elapsed_s())

    def _off_s(self, anchor: Anchor) -> float:
        """Return how long nobody counted."""
        if anchor.boot_id and anchor.boot_id == self._boot.boot_id:
            return max(0.0, self._boot.elapsed_s() - anchor.boot_s)
        return min(MAX_OFF_S, max(0.0, self._clock.now().timestamp() - anchor.wall_s))
