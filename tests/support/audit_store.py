"""The record of who changed what in memory: a full one, for tests of what stands on top of it."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TypeVar

from controller.audit.model import Act, Entry, Filter, OpenAct
from controller.audit.service import Audit, Bounds
from controller.audit.store import AuditReader, AuditRecords
from core.clock import Clock

T = TypeVar("T")


def memory_audit(clock: Clock, *, store: "MemoryAuditStore | None" = None) -> Audit:
    return Audit(store or MemoryAuditStore(), clock=clock, bounds=Bounds(1000, timedelta(days=1)))


class MemoryAuditStore:
    def __init__(self) -> None:
        self.records = _MemoryAuditRecords()

    async def run(self, use_case: Callable[[AuditRecords], T]) -> T:
        return use_case(self.records)

    async def read(self, query: Callable[[AuditReader], T]) -> T:
        return query(self.records)


class _MemoryAuditRecords:
    def __init__(self) -> None:
        # In their order; tests tamper with them.
        self.entries: list[Entry] = []
        self._opened: dict[int, OpenAct] = {}
        self._last_open_id = 0

    def newest(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    def found(self, wanted: Filter) -> Sequence[Entry]:
        return [entry for entry in reversed(self.entries) if _is_wanted(entry, wanted)][: wanted.limit]

    def after(self, entry_id: int, *, limit: int) -> Sequence[Entry]:
        return [entry for entry in self.entries if entry.id > entry_id][:limit]

    def newest_before(self, at: datetime) -> int:
        return max((entry.id for entry in self.entries if entry.at < at), default=0)

    def opened(self) -> Sequence[OpenAct]:
        return list(self._opened.values())

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)

    def remove_through(self, entry_id: int) -> int:
        before = len(self.entries)
        self.entries = [entry for entry in self.entries if entry.id > entry_id]
        return before - len(self.entries)

    def open(self, act: Act, *, at: datetime) -> int:
        self._last_open_id += 1
        self._opened[self._last_open_id] = OpenAct(self._last_open_id, at, act)
        return self._last_open_id

    def describe(self, open_id: int, act: Act) -> None:
        self._opened[open_id] = OpenAct(open_id, self._opened[open_id].at, act)

    def close(self, open_id: int) -> None:
        self._opened.pop(open_id, None)


def _is_wanted(entry: Entry, wanted: Filter) -> bool:
    act = entry.act
    return (
        (wanted.before is None or entry.id < wanted.before)
        and wanted.operator in (None, act.actor.name)
        and wanted.target in (None, act.target)
        and (wanted.since is None or entry.at >= wanted.since)
        and (wanted.action is None or _is_of(act.action, wanted.action))
    )


def _is_of(action: str, wanted: str) -> bool:
    return action.startswith(wanted) if wanted.endswith(".") else action == wanted
