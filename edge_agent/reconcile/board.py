"""What this agent reports of its slots: written by the reconciler, watched by the session and the status file."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from core.fleet_state import Position, Problem, ReportedState, Slot, SlotPhase, SlotReport, Transfer
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
        """Replace all slots; what bringing one in has cost so far stays known."""
        found = {report.slot.model: self._with_cost(report) for report in reports}
        if found != self._reports:
            self._reports = found
            self._announce()

    def advance(
        self, slot: Slot, phase: SlotPhase, *, stored_bytes: int | None = None, total_bytes: int | None = None
    ) -> None:
        report = self._report_of(slot)
        if report is not None:
            stored_bytes = report.stored_bytes if stored_bytes is None else stored_bytes
            total_bytes = report.total_bytes if total_bytes is None else total_bytes
            # Another attempt at the same is no news; that it gets further is.
            problem = report.problem if report.phase is phase else None
            self._put(replace(report, phase=phase, problem=problem, stored_bytes=stored_bytes, total_bytes=total_bytes))

    def progress(self, slot: Slot, stored_bytes: int, total_bytes: int, transfer: Transfer) -> None:
        report = self._report_of(slot)
        if report is not None:
            problem = None if stored_bytes > report.stored_bytes else report.problem
            self._put(
                replace(report, stored_bytes=stored_bytes, total_bytes=total_bytes, transfer=transfer, problem=problem)
            )

    def hold(self, model: ModelName, problem: Problem, *, phase: SlotPhase | None) -> None:
        """Note a failure; `phase` None: it will be tried again, and the slot stays in its phase until then."""
        report = self._reports.get(model)
        if report is not None:
            self._put(replace(report, phase=phase or report.phase, problem=problem))

    def apply(self, position: Position) -> None:
        if position != self._applied:
            self._applied = position
            self._announce()

    def _report_of(self, slot: Slot) -> SlotReport | None:
        """Return the report on `slot`; None when another is shown for its model.

        That is so for the last words of a fetch when a newer state took its place, and for what a model falls back on.
        """
        report = self._reports.get(slot.model)
        return report if report is not None and report.slot == slot else None

    def _with_cost(self, report: SlotReport) -> SlotReport:
        known = self._report_of(report.slot)
        return report if known is None else replace(report, transfer=known.transfer)

    def _put(self, report: SlotReport) -> None:
        if self._reports.get(report.slot.model) != report:
            self._reports[report.slot.model] = report
            self._announce()

    def _announce(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()
