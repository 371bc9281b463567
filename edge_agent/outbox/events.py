"""What an operator wants to know of an agent afterwards: models that came and failed, privacy, losses, clock and disk.

variant.activated, .committed, .rolled_back, .failed, .removed    as its reports to the controller show it
privacy.kept, privacy.refused     in numbers, by model and hour at most; nothing of any request
outbox.lost, .full, .read_only, .faulty, .corrupt, .recovered     what `storage` counted and saw
clock.jumped
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import Protocol, TypeVar

from core.clock import Clock
from core.fleet_state import ReportedState, SlotPhase, SlotReport
from core.ids import ModelName
from edge_agent.outbox.records import event_body
from edge_agent.outbox.rows import Kind, Loss
from edge_agent.outbox.storage import Figures, Incident

K = TypeVar("K")

# Chosen: what repeats is told once in so long, with its number.
SUM_INTERVAL_S = 600.0


class Outbox(Protocol):
    @property
    def figures(self) -> Figures | None: ...

    def put(self, kind: Kind, body: bytes, *, dedupe_id: str) -> bool: ...


class WatchedReport(Protocol):
    """What is used of `reconcile.board.Board`."""

    version: int

    def reported(self) -> ReportedState: ...

    async def wait_beyond(self, version: int) -> int: ...


class Events:
    """`private` says how many requests of each model stayed (`privacy.kept`) or were refused for privacy so far."""

    def __init__(
        self,
        outbox: Outbox,
        private: Callable[[], Mapping[tuple[str, str], int]],
        *,
        boot_id: str,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._outbox = outbox
        self._private = private
        self._boot_id = boot_id
        self._clock = clock
        self._sleep = sleep
        self._numbers = count(1)
        self._told_private: Mapping[tuple[str, str], int] = {}
        self._told_losses: Mapping[tuple[Kind, Loss], int] = {}

    def tell(self, action: str, target: str, detail: str, *, times: int = 1, dedupe_id: str | None = None) -> None:
        """Have it known; without a `dedupe_id` it is told apart from all others of this process."""
        known_as = dedupe_id or f"{self._boot_id}/{next(self._numbers)}"
        body = event_body(action, target, detail, count=times, dedupe_id=known_as, at=self._clock.now())
        self._outbox.put(Kind.AUDIT, body, dedupe_id=known_as)

    def note(self, incident: Incident) -> None:
        self.tell(incident.action, "", incident.detail)

    async def sum_up(self) -> None:
        """Tell, every now and then, what is told in numbers; for ever."""
        while True:
            await self._sleep(SUM_INTERVAL_S)
            self.tell_sums()

    def tell_sums(self) -> None:
        private = self._private()
        for (action, model), times in _grown(private, self._told_private).items():
            self.tell(action, model, f"{times} requests", times=times)
        self._told_private = private
        figures = self._outbox.figures
        losses = {} if figures is None else figures.losses
        for (kind, why), rows in _grown(losses, self._told_losses).items():
            self.tell("outbox.lost", kind.value, f"{rows} rows: {why.value}", times=rows)
        self._told_losses = losses

    async def follow(self, board: WatchedReport) -> None:
        """Tell what becomes of models, for ever."""
        seen: Mapping[ModelName, SlotReport] = {}
        version = -1
        while True:
            version = await board.wait_beyond(version)
            state = board.reported()
            now = {report.slot.model: report for report in state.slots}
            at = f"{state.applied.epoch}.{state.applied.generation}"
            for action, report in news(seen, now):
                slot = report.slot
                detail = f"version {slot.version}, {slot.variant}"
                if report.problem is not None:
                    detail += f": {report.problem.message}"
                # The same again after a restart is no news.
                self.tell(action, slot.model, detail, dedupe_id=f"{action}/{at}/{slot.manifest_digest[-32:]}")
            seen = now


def news(
    before: Mapping[ModelName, SlotReport], after: Mapping[ModelName, SlotReport]
) -> Sequence[tuple[str, SlotReport]]:
    """Return what happened to models between two reports that an operator wants to know."""
    told = []
    for model, report in after.items():
        was = before.get(model)
        is_same = was is not None and was.slot == report.slot
        was_phase = was.phase if was is not None and is_same else None
        if report.phase is not was_phase and (action := _action(was_phase, report.phase)) is not None:
            told.append((action, report))
    return [*told, *(("variant.removed", report) for model, report in before.items() if model not in after)]


def _action(was: SlotPhase | None, now: SlotPhase) -> str | None:
    if now is SlotPhase.FAILED:
        return "variant.rolled_back" if was is SlotPhase.PROBATION else "variant.failed"
    if now is SlotPhase.READY and was is SlotPhase.PROBATION:
        return "variant.committed"
    return "variant.activated" if now in {SlotPhase.PROBATION, SlotPhase.READY} else None


def _grown(after: Mapping[K, int], before: Mapping[K, int]) -> Mapping[K, int]:
    return {key: number - before.get(key, 0) for key, number in after.items() if number > before.get(key, 0)}
