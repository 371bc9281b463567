"""How many joules this agent's answers take: the machine's energy, by the agent's share of its processor time.

    every 5 s   machine's joules ─ best source that can say ─┐
                agent's and machine's processor time ────────┴─→ agent's joules, under the name of that method

The share is of the time in which any processor was busy, so the energy of a machine at rest falls to those who use it,
and what all processes are charged adds up to what the machine took. Figures of different methods are never added.

Nothing here wakes an agent: `refresh` is called by the loop that looks after the status file, and reads on the disk's
thread, for a battery's controller may take its time. A window over which the machine slept says nothing and is left
out. Source of the times: `man 5 proc`, /proc/stat.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from core.clock import Clock
from core.fleet_state import Energy, EnergyMethod, Usage
from edge_agent.energy.sources import Battery, Model, Rapl, Source, Window
from edge_agent.settings import EnergySettings

_log = logging.getLogger(__name__)

# Chosen: long beside a tick of /proc/stat (10 ms). A look takes 0.1 ms (measured without counters): 0.002 % of a core.
INTERVAL_S = 5.0
# Over which the recent figure is taken, in windows: a minute.
RECENT_WINDOWS = 12
# Fewer answers than this in a minute say more about the machine's rest than about an answer.
MIN_ANSWERS = 10
_SLEPT_S = 1.0
# Positions in the first line of /proc/stat, without its name. Guests are counted in `user` already.
_IDLE, _IOWAIT, _GUEST = 3, 4, 8


class Times(NamedTuple):
    """What the clocks say: seconds that passed, with and without sleep, and seconds of processor time."""

    awake_s: float
    passed_s: float
    agent_s: float
    # Of all processors, idle and busy; None where the system does not tell.
    machine_busy_s: float | None
    processors: int


@dataclass(frozen=True, slots=True)
class _Part:
    """The agent's part of one window."""

    method: EnergyMethod
    joules: float
    answers: int
    seconds: float


class EnergyMeter:
    def __init__(
        self,
        settings: EnergySettings,
        *,
        usage: Callable[[], Usage],
        disk: Executor,
        clock: Clock,
        tell: Callable[[float | None], None] = lambda _: None,
        root: Path = Path("/"),
        read_times: Callable[[], Times] | None = None,
    ) -> None:
        """Read `usage`, what became of requests so far, and what /sys and /proc below `root` say.

        `tell` is called with what an answer takes where that is measured, see `measured_j`.
        """
        self._is_enabled = settings.enabled
        self._usage = usage
        self._tell = tell
        self._disk = disk
        self._clock = clock
        self._read_times = read_times or (lambda: times_of(root))
        model = Model(idle_watts=settings.idle_watts, max_watts=settings.max_watts)
        self._sources: Sequence[Source] = (Rapl(root=root), Battery(root=root), model)
        self._looked_s = float("-inf")
        self._times: Times | None = None
        self._answered = 0
        self._totals: dict[EnergyMethod, Energy] = {}
        self._recent: deque[_Part] = deque(maxlen=RECENT_WINDOWS)
        self._method: EnergyMethod | None = None

    @property
    def energy(self) -> Energy | None:
        """What was taken by the method in use now, since the process began; None: nothing is known yet."""
        return None if self._method is None else self._totals[self._method]

    def totals(self) -> Sequence[Energy]:
        """Return what was taken, by each method that was in use."""
        return tuple(self._totals.values())

    @property
    def measured_j(self) -> float | None:
        """Joules per answer over the last minute, where that was measured for this machine alone and says something."""
        energy = self.energy
        if energy is None or energy.method is not EnergyMethod.RAPL or energy.recent_answers < MIN_ANSWERS:
            return None
        return energy.recent_j_per_answer

    async def refresh(self) -> None:
        """Look, unless that was done a moment ago."""
        now_s = self._clock.monotonic_s()
        if not self._is_enabled or now_s - self._looked_s < INTERVAL_S:
            return
        self._looked_s = now_s
        part = await asyncio.get_running_loop().run_in_executor(self._disk, self._look)
        if part is not None:
            self._account(part)
            self._tell(self.measured_j)

    def _look(self) -> _Part | None:
        """Read everything and return what the agent took since the last look; on the disk's thread."""
        times, before = self._read_times(), self._times
        answered, answered_before = self._usage().answered, self._answered
        self._times, self._answered = times, answered
        window = Window(0.0, 0.0) if before is None else _window(before, times)
        # Each is asked each time: a counter must be read at both ends of a window.
        told = [(source.method, source.joules(window)) for source in self._sources]
        if before is None or window.seconds <= 0 or _slept(before, times):
            return None
        method, joules = next((method, joules) for method, joules in told if joules is not None)
        return _Part(method, joules * _share(before, times), answered - answered_before, window.seconds)

    def _account(self, part: _Part) -> None:
        if part.method is not self._method:
            _log.info("energy is known by another method", extra={"method": part.method.value})
            self._method = part.method
            self._recent.clear()
        self._recent.append(part)
        total = self._totals.get(part.method) or Energy(part.method, joules=0.0, answers=0)
        seconds = sum(recent.seconds for recent in self._recent)
        joules = sum(recent.joules for recent in self._recent)
        self._totals[part.method] = replace(
            total,
            joules=total.joules + part.joules,
            answers=total.answers + part.answers,
            watts=joules / seconds,
            recent_joules=joules,
            recent_answers=sum(recent.answers for recent in self._recent),
        )


def times_of(root: Path) -> Times:
    used = os.times()
    return Times(
        time.monotonic(),
        time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic(),
        used.user + used.system + used.children_user + used.children_system,
        _busy_s(root / "proc" / "stat"),
        os.cpu_count() or 1,
    )


def _busy_s(stat: Path) -> float | None:
    try:
        with stat.open() as lines:
            ticks = [int(word) for word in lines.readline().split()[1:]]
    except (OSError, ValueError):
        return None
    if len(ticks) <= _IOWAIT:
        return None
    busy = sum(ticks[:_GUEST]) - ticks[_IDLE] - ticks[_IOWAIT]
    return busy / os.sysconf("SC_CLK_TCK")


def _window(before: Times, now: Times) -> Window:
    seconds = now.awake_s - before.awake_s
    room_s = seconds * now.processors
    return Window(seconds, min(1.0, _busy_between(before, now) / room_s) if room_s > 0 else 0.0)


def _share(before: Times, now: Times) -> float:
    """Return the agent's part of the processor time; what ticks are too coarse for is never more than all of it."""
    agent_s = max(0.0, now.agent_s - before.agent_s)
    busy_s = max(agent_s, _busy_between(before, now))
    return agent_s / busy_s if busy_s > 0 else 0.0


def _busy_between(before: Times, now: Times) -> float:
    if before.machine_busy_s is None or now.machine_busy_s is None:
        # Nobody else is known of.
        return max(0.0, now.agent_s - before.agent_s)
    return max(0.0, now.machine_busy_s - before.machine_busy_s)


def _slept(before: Times, now: Times) -> bool:
    return (now.passed_s - before.passed_s) - (now.awake_s - before.awake_s) > _SLEPT_S
