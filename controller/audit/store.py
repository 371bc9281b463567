"""The port from the record to a database; `controller.storage.audit` implements it.

A use case is a function over `AuditRecords`, and the store runs it as one transaction.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from controller.audit.model import Act, Entry, Filter, OpenAct

T = TypeVar("T")


class AuditReader(Protocol):
    def newest(self) -> Entry | None: ...

    def found(self, wanted: Filter) -> Sequence[Entry]:
        """Return what `wanted` asks for, the newest first."""
        ...

    def after(self, entry_id: int, *, limit: int) -> Sequence[Entry]:
        """Return the entries that follow `entry_id`, in their order."""
        ...

    def newest_before(self, at: datetime) -> int:
        """Return the id of the newest entry that is older than `at`; 0: there is none."""
        ...

    def opened(self) -> Sequence[OpenAct]:
        """Return the acts whose end is not known, in their order."""
        ...


class AuditRecords(AuditReader, Protocol):
    def add(self, entry: Entry) -> None: ...

    def remove_through(self, entry_id: int) -> int:
        """Remove the entry and all older ones; return how many were there."""
        ...

    def open(self, act: Act, *, at: datetime) -> int:
        """Store an act that begins; return its id."""
        ...

    def describe(self, open_id: int, act: Act) -> None:
        """Say more about an act that is open."""
        ...

    def close(self, open_id: int) -> None:
        """Forget an open act."""
        ...


class AuditStore(Protocol):
    async def run(self, use_case: Callable[[AuditRecords], T]) -> T:
        """Run `use_case` as one transaction: kept when it returns, undone when it raises."""
        ...

    async def read(self, query: Callable[[AuditReader], T]) -> T: ...
