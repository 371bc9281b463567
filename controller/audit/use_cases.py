"""The transactions of the record: functions over records, pure apart from them."""

from collections.abc import Sequence
from datetime import datetime

from controller.audit.chain import linked
from controller.audit.model import CONTROLLER, INTERRUPTED, OK, Act, Entry, Filter, Result
from controller.audit.store import AuditRecords

BOUND_ACTION = "audit.bound"


def append(records: AuditRecords, act: Act, result: Result, *, at: datetime, max_entries: int) -> Entry:
    """Add an entry to the end of the chain, and let go of the oldest beyond `max_entries`."""
    entry = _append(records, act, result, at=at)
    if entry.id > max_entries:
        let_go(records, entry.id - max_entries, at=at, reason=f"at most {max_entries} entries are kept")
    return entry


def end(records: AuditRecords, open_id: int, act: Act, result: Result, *, at: datetime, max_entries: int) -> Entry:
    """Turn an open act into an entry."""
    records.close(open_id)
    return append(records, act, result, at=at, max_entries=max_entries)


def close_interrupted(records: AuditRecords, *, at: datetime, max_entries: int) -> Sequence[Entry]:
    """Turn every act that a crash left open into an entry that says so."""
    return [
        end(
            records,
            left.id,
            Act(left.act.actor, left.act.action, left.act.target, _interrupted(left.at, left.act.detail)),
            INTERRUPTED,
            at=at,
            max_entries=max_entries,
        )
        for left in records.opened()
    ]


def let_go(records: AuditRecords, through_id: int, *, at: datetime, reason: str) -> int:
    """Remove the entries up to `through_id`; say so in an entry, once for as long as that entry is kept itself.

    The newest stays whatever its age: the chain goes on from it.
    """
    newest = records.newest()
    removed = 0 if newest is None else records.remove_through(min(through_id, newest.id - 1))
    if removed and not records.found(Filter(1, action=BOUND_ACTION)):
        _append(records, Act(CONTROLLER, BOUND_ACTION, detail=f"{reason}; older ones go from now on"), OK, at=at)
    return removed


def _append(records: AuditRecords, act: Act, result: Result, *, at: datetime) -> Entry:
    entry = linked(records.newest(), act, result, at=at)
    records.add(entry)
    return entry


def _interrupted(began_at: datetime, detail: str) -> str:
    said = f"began at {began_at.isoformat(timespec='seconds')}, the controller ended before the outcome was known"
    return f"{detail}; {said}" if detail else said
