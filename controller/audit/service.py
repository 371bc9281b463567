"""`Audit`: what the operator's API, the composition root and the features' reports may do with the record."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

from controller.audit import use_cases
from controller.audit.budget import RefusalBudget
from controller.audit.chain import Links, bounded
from controller.audit.model import CONTROLLER, OK, Act, Actor, Entry, Filter, Head, Outcome, Page, Result, Verification
from controller.audit.store import AuditReader, AuditRecords, AuditStore
from core.clock import Clock
from core.errors import NanofleetError

_log = logging.getLogger(__name__)

TIDY_INTERVAL_S = 3600.0
# Chosen: as many as may happen while the database is locked for a moment.
MAX_REPORTS = 1024
# Chosen: some milliseconds of a reader thread, which others wait for as well.
ENTRIES_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is kept; what is older or beyond it goes."""

    max_entries: int
    kept_for: timedelta


class OpenRecord:
    """One act on its way; made by `Audit.begin`."""

    def __init__(self, audit: "Audit", open_id: int, act: Act) -> None:
        self._audit = audit
        self._id = open_id
        self.act = act

    async def describe(self, *, target: str | None = None, detail: str | None = None) -> None:
        """Say, durably and before anything is changed, more about what is asked for."""
        self.add(target=target, detail=detail)
        await self._audit.describe(self._id, self.act)

    def add(self, *, target: str | None = None, detail: str | None = None) -> None:
        """Say more for the entry that will be."""
        act = self.act
        self.act = replace(
            act, target=act.target if target is None else target, detail=act.detail if detail is None else detail
        )

    async def end(self, result: Result) -> None:
        await self._audit.end(self._id, self.act, result)


class Audit:
    """Call `prepare` first and keep `run` running in a task of the owner: it writes down what was reported."""

    def __init__(self, store: AuditStore, *, clock: Clock, bounds: Bounds) -> None:
        self._store = store
        self._clock = clock
        self._bounds = bounds
        self._budget = RefusalBudget()
        self._reports: deque[tuple[datetime, Act, Result]] = deque()
        self._has_reports = asyncio.Event()
        self._lost = 0

    async def prepare(self) -> None:
        """Write down which acts a crash cut off."""
        now, most = self._clock.now(), self._bounds.max_entries
        cut_off = await self._store.run(lambda records: use_cases.close_interrupted(records, at=now, max_entries=most))
        for entry in cut_off:
            _log.warning(
                "a change was cut off when the controller ended; look whether it was made",
                extra={"action": entry.act.action, "target": entry.act.target, "operator": entry.act.actor.name},
            )

    async def run(self) -> None:
        """Write down what is reported, and let go of what is too old; for ever."""
        while True:
            await self.tidy()
            until_s = self._clock.monotonic_s() + TIDY_INTERVAL_S
            while (left_s := until_s - self._clock.monotonic_s()) > 0:
                try:
                    async with asyncio.timeout(left_s):
                        await self._has_reports.wait()
                except TimeoutError:
                    break
                await self.flush()

    async def tidy(self) -> None:
        """Let go of entries that are older than the bound."""
        now, kept_for = self._clock.now(), self._bounds.kept_for

        def let_go(records: AuditRecords) -> int:
            through = records.newest_before(now - kept_for)
            return use_cases.let_go(records, through, at=now, reason=f"entries are kept for {kept_for.days} days")

        if removed := await self._store.run(let_go):
            _log.info("audit entries beyond the bound removed", extra={"entries": removed})

    # ---- acts of operators ------------------------------------------------------------------------------------

    async def begin(self, act: Act) -> OpenRecord:
        """Store what is asked for, before it is done. What cannot be recorded must not be done: raises as the store."""
        now, act = self._clock.now(), bounded(act)
        return OpenRecord(self, await self._store.run(lambda records: records.open(act, at=now)), act)

    async def describe(self, open_id: int, act: Act) -> None:
        await self._store.run(lambda records: records.describe(open_id, bounded(act)))

    async def end(self, open_id: int, act: Act, result: Result) -> None:
        now, most = self._clock.now(), self._bounds.max_entries
        await self._store.run(lambda records: use_cases.end(records, open_id, act, result, at=now, max_entries=most))

    async def record(self, act: Act, result: Result = OK) -> None:
        """Write down what was done."""
        now, most = self._clock.now(), self._bounds.max_entries
        await self._store.run(lambda records: use_cases.append(records, act, result, at=now, max_entries=most))

    # ---- what is reported -------------------------------------------------------------------------------------

    def report(self, act: Act, result: Result = OK) -> None:
        """Have something written down soon; callers wait for nothing."""
        if len(self._reports) >= MAX_REPORTS:
            self._lost += 1
            _log.log(
                logging.ERROR if self._lost == 1 else logging.DEBUG,
                "audit report lost: the database does not keep up",
                extra={"action": act.action, "lost": self._lost},
            )
            return
        self._reports.append((self._clock.now(), act, result))
        self._has_reports.set()

    def decided(self, action: str, target: str, detail: str) -> None:
        """Report what the controller decided by itself."""
        self.report(Act(CONTROLLER, action, target, detail))

    def refused(self, actor: Actor, action: str, *, target: str, error: NanofleetError) -> None:
        """Report a refusal; beyond a bound per culprit they are only counted."""
        left_out = self._budget.take(actor.name, now_s=self._clock.monotonic_s())
        if left_out is not None:
            detail = f"after {left_out} more that were not written down" if left_out else ""
            self.report(Act(actor, action, target, detail), Result(Outcome.REFUSED, error.code.value))

    async def flush(self) -> None:
        """Write down what was reported until now, in one transaction."""
        self._has_reports.clear()
        reports, most = list(self._reports), self._bounds.max_entries
        if not reports:
            return

        def append_all(records: AuditRecords) -> None:
            for at, act, result in reports:
                use_cases.append(records, act, result, at=at, max_entries=most)

        try:
            await self._store.run(append_all)
        except BaseException:
            self._has_reports.set()
            raise
        for _ in reports:
            self._reports.popleft()

    # ---- reading ----------------------------------------------------------------------------------------------

    async def entries(self, wanted: Filter) -> Page:
        """Return entries, the newest first."""
        await self.flush()
        found = await self._store.read(lambda records: records.found(replace(wanted, limit=wanted.limit + 1)))
        shown = tuple(found[: wanted.limit])
        return Page(shown, shown[-1].id if len(found) > wanted.limit else None)

    async def verify(self, noted: Head | None = None) -> Verification:
        """Follow the whole chain, and look for an entry that was noted down elsewhere."""
        links = Links(noted)
        while True:
            entries = await self._store.read(partial(_after, links.last_id))
            # In a thread: hashing a page would hold up everybody else for some twenty milliseconds.
            if not entries or not await asyncio.to_thread(links.follow, entries):
                return links.found()


def _after(entry_id: int, records: AuditReader) -> Sequence[Entry]:
    return records.after(entry_id, limit=ENTRIES_AT_ONCE)
