"""One request between its admission and its answer, as queue and batcher see it."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from core.errors import NanofleetError
from core.tensors import Array
from edge_agent.cascade.confidence import Verdict

NEVER = math.inf


class Ran(NamedTuple):
    """What became of one request: its own rows of the outputs, and how the batch went."""

    outputs: Sequence[Array]
    verdict: Verdict | None
    started_s: float
    finished_s: float
    batch_rows: int


class Waiter(Protocol):
    """The one who asked; `settle` or `fail` is called at most once, in the loop."""

    @property
    def future(self) -> "asyncio.Future[Any]":
        """Done, however that came, from when nobody waits any more."""
        ...

    def is_waiting(self) -> bool: ...
    def settle(self, ran: Ran) -> None: ...
    def fail(self, error: NanofleetError) -> None: ...


class Job:
    """A request that waits; what the queue makes of it is there once it has been queued."""

    __slots__ = (
        "client",
        "deadline_s",
        "due_s",
        "inputs",
        "is_queued",
        "kind",
        "number",
        "priority",
        "rows",
        "size_bytes",
        "waiter",
    )

    def __init__(
        self,
        inputs: Sequence[Array],
        waiter: Waiter,
        *,
        rows: int,
        kind: tuple[tuple[int, ...], ...] = (),
        size_bytes: int = 0,
        deadline_s: float = NEVER,
        priority: int = 0,
        client: str = "",
    ) -> None:
        """`kind` has to be equal to share a run: the shape behind the first dimension, of every input."""
        # When its run must have ended, so that time for the reply is left.
        self.due_s: float
        # In order of arrival.
        self.number: int
        # Whether it has a place in the queue now.
        self.is_queued: bool
        self.inputs = inputs
        self.waiter = waiter
        self.rows = rows
        self.kind = kind
        self.size_bytes = size_bytes
        self.deadline_s = deadline_s
        self.priority = priority
        self.client = client
