"""The values of the outbox: what a row is, how many there may be, and the words for what became of the others."""

from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias

# Derived: SQLite's cost of a row beside its own bytes: record header, both indexes, a share of a page.
ROW_COST_BYTES = 96


class Kind(StrEnum):
    """In the order in which room is made when all kinds together are too large: the least missed first."""

    TELEMETRY = "telemetry"
    """Spans that could not be exported: an OTLP ExportTraceServiceRequest, deflated."""
    ESCALATION = "escalation"
    """Requests whose callers make do with a heavy tier's verdict hours later."""
    AUDIT = "audit"
    """What this agent did that an operator wants to know."""
    USAGE = "usage"
    """What became of the requests of one hour and model."""


class Loss(StrEnum):
    """Why a row was lost."""

    ROWS = "rows"
    BYTES = "bytes"
    AGE = "age"
    TOTAL = "total"
    """All kinds together were too large."""
    SIZE = "size"
    """Larger than all of its kind may be."""
    BACKLOG = "backlog"
    """More came than the thread could take."""
    MEMORY = "memory"
    """The disk takes nothing, and memory holds little."""
    CORRUPT = "corrupt"
    """It was in a database that had to be set aside."""
    POISON = "poison"
    """Its receiver will never take it."""


Losses: TypeAlias = dict[tuple[Kind, Loss], int]


class NewRow(NamedTuple):
    """Of two rows of one kind with one `dedupe_id` the newer takes the place of the older, at the end of the queue."""

    kind: Kind
    dedupe_id: str
    body: bytes
    # Age clock (`ageing`), and the wall clock as it was.
    born_s: float
    at_us: int

    @property
    def size_bytes(self) -> int:
        return len(self.body) + len(self.dedupe_id) + ROW_COST_BYTES


class Row(NamedTuple):
    """A row in its place: `number` grows along the queue and is never used again."""

    number: int
    kind: Kind
    dedupe_id: str
    body: bytes
    born_s: float
    at_us: int


class Bounds(NamedTuple):
    max_rows: int
    max_bytes: int
    max_age_s: float


class Tally(NamedTuple):
    """What is there of a kind; `oldest_s` is its birth on the age clock."""

    rows: int = 0
    size_bytes: int = 0
    oldest_s: float | None = None


class Queue(Protocol):
    """One place where rows are; `database.Database` and `ring.Ring`."""

    def add(self, rows: "list[NewRow]") -> None: ...

    def oldest(self, kind: Kind, *, limit: int, max_bytes: int) -> "list[Row]": ...

    def remove(self, numbers: "list[int]") -> None: ...

    def tally(self, kind: Kind) -> Tally: ...

    def shed_oldest(self, kind: Kind, rows: int) -> None: ...

    def shed_bytes(self, kind: Kind, size_bytes: int) -> int: ...

    def shed_older(self, kind: Kind, born_before_s: float) -> int: ...


def keep_within(queue: Queue, bounds: "dict[Kind, Bounds]", *, max_bytes: int, now_s: float) -> Losses:
    """Shed the oldest rows of each kind until all bounds hold; return how many went, and why."""
    lost: Losses = {}
    for kind, bound in bounds.items():
        _count(lost, kind, Loss.AGE, queue.shed_older(kind, now_s - bound.max_age_s))
        excess = queue.tally(kind).rows - bound.max_rows
        if excess > 0:
            queue.shed_oldest(kind, excess)
            _count(lost, kind, Loss.ROWS, excess)
        over_bytes = queue.tally(kind).size_bytes - bound.max_bytes
        if over_bytes > 0:
            _count(lost, kind, Loss.BYTES, queue.shed_bytes(kind, over_bytes))
    for kind in Kind:
        over_bytes = sum(queue.tally(each).size_bytes for each in Kind) - max_bytes
        if over_bytes > 0:
            _count(lost, kind, Loss.TOTAL, queue.shed_bytes(kind, over_bytes))
    return lost


def _count(lost: Losses, kind: Kind, why: Loss, rows: int) -> None:
    if rows:
        lost[kind, why] = lost.get((kind, why), 0) + rows
