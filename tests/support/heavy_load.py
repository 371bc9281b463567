"""Steady load on something that is killed in the middle of it, and what became of every request."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from core.clock import SystemClock
from core.deadline import Deadline
from core.errors import NanofleetError

CALLERS = 8
DEADLINE_S = 2.0
# Answers in a row, over all callers, that count as steady.
STEADY = 200
RECOVERY_TIMEOUT_S = 60.0


@dataclass
class LoadReport:
    """Every request ended in one of these ways; another exception ends the load and the test."""

    answered_before: int = 0
    answered_after: int = 0
    refusals: Counter[type[NanofleetError]] = field(default_factory=Counter)
    longest_over_deadline_s: float = 0.0
    has_struck: bool = False
    recovered: asyncio.Event = field(default_factory=asyncio.Event)
    steady: asyncio.Event = field(default_factory=asyncio.Event)
    in_a_row: int = 0

    def note_answer(self) -> None:
        self.in_a_row += 1
        if self.has_struck:
            self.answered_after += 1
            if self.in_a_row >= STEADY:
                self.recovered.set()
        else:
            self.answered_before += 1
            if self.in_a_row >= STEADY:
                self.steady.set()

    def note_refusal(self, error: NanofleetError) -> None:
        self.in_a_row = 0
        self.refusals[type(error)] += 1


async def ask_under_load(ask: Callable[[Deadline], Awaitable[object]], *, then: Callable[[], object]) -> LoadReport:
    """Let some callers ask without pause, call `then` once all is steady, and return when it is steady again."""
    report = LoadReport()
    async with asyncio.timeout(RECOVERY_TIMEOUT_S), asyncio.TaskGroup() as group:
        callers = [group.create_task(_keep_asking(ask, report)) for _ in range(CALLERS)]
        await report.steady.wait()
        await asyncio.to_thread(then)
        report.has_struck, report.in_a_row = True, 0
        await report.recovered.wait()
        for caller in callers:
            caller.cancel()
    return report


async def _keep_asking(ask: Callable[[Deadline], Awaitable[object]], report: LoadReport) -> None:
    clock = SystemClock()
    while True:
        deadline = Deadline.after(DEADLINE_S, now_s=clock.monotonic_s())
        try:
            await ask(deadline)
        except NanofleetError as error:
            report.note_refusal(error)
            # A refusal comes at once; without a pause the callers would spin.
            await asyncio.sleep(0.02)
        else:
            report.note_answer()
        over_s = -deadline.remaining_s(clock.monotonic_s())
        report.longest_over_deadline_s = max(report.longest_over_deadline_s, over_s)
