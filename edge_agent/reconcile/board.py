"""What this agent reports of its slots: written by the reconciler, watched by the session and the status file."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from core.fleet_state import Position, Problem, ReportedState, Slot, SlotPhase, SlotReport
from core.ids import ModelName


class Board:
    """The reported state and its version, which grows with every change."""

    def __init__(self, applied: Position) -> None:
        self.version = 0
        self._applied = applied
        self._reports: dict[ModelName, SlotReport] = {}
        self._changed = asyncio.Event()

    def reported(self) -> ReportedState:
        return ReportedState(self._applied, tuple(self._reports.values()))

    async def wait_beyond(self, version: int) -> int:
        """Return the version as soon as it is beyond `version`; changes in between count as one."""
        while self.version == version:
            await self._changed.wait()
        return self.version

    def show(self, reports: Iterable[SlotReport]) -> None:
        """Replace all slots."""
        found = {report.slot.model: report for report in reports}
        if found != self._reports:
            self._reports = found
            self._announce()

    def advance(self, slot: Slot, phase: SlotPhase) -> None:
        self._put(replace(self._reports[slot.model], phase=phase, problem=None))

    def progress(self, slot: Slot, stored_bytes: int, total_bytes: int) -> None:
        report = self._reports.get(slot.model)
        # The last words of a fetch may come after another state took its place.
        if report is not None and report.slot == slot:
            self._put(replace(report, stored_bytes=stored_bytes, total_bytes=total_bytes))

    def hold(self, model: ModelName, problem: Problem, *, final: bool) -> None:
        """Note a failure: the slot stays in its phase while it will be tried again, and is FAILED when it will not."""
        report = self._reports.get(model)
        if report is not None:
            phase = SlotPhase.FAILED if final else report.phase
            self._put(replace(report, phase=phase, problem=problem))

    def apply(self, position: Position) -> None:
        if position != self._applied:
            self._applied = position
            self._announce()

    def _put(self, report: SlotReport) -> None:
        if self._reports.get(report.slot.model) != report:
            self._reports[report.slot.model] = report
            self._announce()

    def _announce(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()
