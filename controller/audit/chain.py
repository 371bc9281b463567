"""The chain: each entry is hashed together with the hash of the one before it. Pure.

A change in the middle shows at the entry itself or at the next one. What does not show is a chain made anew from some
entry on, or cut at its end, by somebody who may write the database: for that, note the head elsewhere and have it
looked for (`nanofleet audit verify --head`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

import orjson

from controller.audit.model import MAX_TEXT_CHARS, Act, Entry, Head, Result, Verification
from core.logs import peer_text

NO_ENTRY_SHA256 = "0" * 64


def linked(previous: Entry | None, act: Act, result: Result, *, at: datetime) -> Entry:
    """Return the entry that follows `previous`, bounded."""
    before = NO_ENTRY_SHA256 if previous is None else previous.sha256
    entry = Entry(1 if previous is None else previous.id + 1, at, bounded(act), result, before, "")
    return replace(entry, sha256=sha256_of(entry))


def sha256_of(entry: Entry) -> str:
    """Return the hash of an entry: over the JSON of all else that it says, in this order."""
    act, result = entry.act, entry.result
    said = (
        entry.previous_sha256,
        entry.id,
        entry.at.isoformat(),
        act.actor.name,
        act.actor.role,
        act.actor.source,
        act.action,
        act.target,
        act.detail,
        result.outcome.value,
        result.code,
    )
    return hashlib.sha256(orjson.dumps(said)).hexdigest()


class Links:
    """Entries looked at in their order, oldest first."""

    def __init__(self, noted: Head | None = None) -> None:
        self._noted = noted
        self._first: Entry | None = None
        self._last: Entry | None = None
        self._count = 0
        self._problem: str | None = None
        self._broken_at: int | None = None
        self._has_seen_noted = noted is None

    @property
    def last_id(self) -> int:
        return 0 if self._last is None else self._last.id

    def follow(self, entries: Sequence[Entry]) -> bool:
        """Look at the next entries; return whether to go on."""
        for entry in entries:
            if (problem := self._problem_of(entry)) is not None:
                self._problem, self._broken_at = problem, entry.id
                return False
            self._first = self._first or entry
            self._last = entry
            self._count += 1
        return True

    def found(self) -> Verification:
        problem = self._problem
        if problem is None and not self._has_seen_noted and self._noted is not None:
            problem = f"expected the noted entry {self._noted.id}, it is not here: the end or the beginning was cut off"
        return Verification(self._count, _head(self._first), _head(self._last), problem, self._broken_at)

    def _problem_of(self, entry: Entry) -> str | None:
        last = self._last
        if last is not None and entry.id != last.id + 1:
            return f"expected entry {last.id + 1} after {last.id}, got {entry.id}: entries were taken out"
        if last is not None and entry.previous_sha256 != last.sha256:
            return f"entry {entry.id}: does not follow entry {last.id} as it is now"
        if entry.sha256 != sha256_of(entry):
            return f"entry {entry.id}: is not what it was when it was written"
        return self._problem_of_noted(entry)

    def _problem_of_noted(self, entry: Entry) -> str | None:
        if self._noted is None or entry.id != self._noted.id:
            return None
        self._has_seen_noted = True
        if entry.sha256 == self._noted.sha256:
            return None
        return f"entry {entry.id}: expected the noted hash {self._noted.sha256[:16]}, got {entry.sha256[:16]}"


def _head(entry: Entry | None) -> Head | None:
    return None if entry is None else Head(entry.id, entry.sha256)


def bounded(act: Act) -> Act:
    """Return the act with texts of at most MAX_TEXT_CHARS printable characters."""
    return replace(act, target=_text(act.target), detail=_text(act.detail))


def _text(text: str) -> str:
    return peer_text(text)[:MAX_TEXT_CHARS]
