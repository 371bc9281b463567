"""One execution per request: whatever comes again finds its reply, or that it is under way.

    begin → Execution           run it, then `finish`; or `forget`, when it was refused only for now
          → replies             it was run; this was answered: a provisional reply, the final one, or both
          → none                it is under way; its answer comes

A request is known by client and correlation data until its deadline, whatever its QoS: a broker delivers QoS 1 messages
again, and a device sends again what was unanswered when its connection broke. Content tells a repetition from another
request under a correlation that is still taken, which is a conflict.

Bounded in requests and bytes, both shared by those clients that need them: where there is too little room, a client
with more than its share gives up its oldest, so nobody can push out what others need. What is under way is never given
up, and may stand beyond the bounds: the front bounds it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from core.errors import Conflict
from edge_agent.front.mqtt.wire import Reply

# Measured (CPython 3.11, 2,000 requests): what a remembered request takes beside payload, properties and topic.
OVERHEAD_BYTES = 500


class Execution:
    """One request that is or was run; of one Duplicates."""

    __slots__ = ("content", "correlation", "deadline_s", "final", "is_under_way", "provisional", "shelf", "size_bytes")

    def __init__(self, shelf: "_Shelf", correlation: bytes, content: int, deadline_s: float) -> None:
        self.shelf = shelf
        self.correlation = correlation
        self.content = content
        self.deadline_s = deadline_s
        self.is_under_way = True
        self.provisional: Reply | None = None
        self.final: Reply | None = None
        self.size_bytes = OVERHEAD_BYTES

    @property
    def replies(self) -> Sequence[Reply]:
        return [reply for reply in (self.provisional, self.final) if reply is not None]


class Duplicates:
    def __init__(self, *, max_requests: int, max_bytes: int, note_forgotten: Callable[[], None] = lambda: None) -> None:
        """`note_forgotten` is called for every request that a bound made this forget before its deadline."""
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._note_forgotten = note_forgotten
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        # By the whole second after which they are over.
        self._ending: dict[int, set[Execution]] = {}
        self._looked_at = -1
        self._requests = self._size_bytes = 0

    def begin(
        self, client: str, correlation: bytes, *, content: int, deadline_s: float, now_s: float
    ) -> Execution | Sequence[Reply]:
        """Note a request; return what is to be run, or the replies that it has so far.

        Args:
            content: a hash of what is asked. Keyed per process, so that nobody makes two that collide.

        Raises:
            Conflict: the client has asked something else under this correlation, and the time for it is not over.
        """
        if now_s >= self._looked_at + 1:
            self._drop_ended(now_s)
        shelf = self._shelves.get(client)
        if shelf is None:
            shelf = self._shelves[client] = _Shelf(client)
        known = shelf.executions.get(correlation)
        if known is not None and known.deadline_s > now_s:
            if known.content != content:
                raise Conflict("Correlation Data: expected new ones for another request, got those of one not yet over")
            return known.replies
        if known is not None:
            self.forget(known)
            self._shelves[client] = shelf
        return self._note(Execution(shelf, correlation, content, deadline_s))

    def finish(self, execution: Execution, reply: Reply) -> None:
        """Store the final reply."""
        if self._holds(execution) and execution.final is None:
            execution.final = reply
            execution.is_under_way = False
            self._grow(execution, reply.size_bytes)

    def note_provisional(self, execution: Execution, reply: Reply, *, is_under_way: bool) -> None:
        """Store a reply that another one follows, from this run or else by `follow_up`."""
        if self._holds(execution) and execution.final is None:
            known, execution.provisional = execution.provisional, reply
            execution.is_under_way = is_under_way
            self._grow(execution, reply.size_bytes - (0 if known is None else known.size_bytes))

    def follow_up(self, client: str, correlation: bytes, reply: Reply) -> None:
        """Store the final reply behind a provisional one; a request of the same name that has none is another one."""
        shelf = self._shelves.get(client)
        execution = None if shelf is None else shelf.executions.get(correlation)
        if execution is not None and execution.provisional is not None:
            self.finish(execution, reply)

    def forget(self, execution: Execution) -> None:
        """Let the request be run again, for example because it was refused only for now."""
        if not self._holds(execution):
            return
        shelf = execution.shelf
        del shelf.executions[execution.correlation]
        self._requests -= 1
        self._size_bytes -= execution.size_bytes
        shelf.size_bytes -= execution.size_bytes
        second = int(execution.deadline_s)
        ending = self._ending[second]
        ending.discard(execution)
        if not ending:
            del self._ending[second]
        if not shelf.executions:
            del self._shelves[shelf.client]

    def __len__(self) -> int:
        return self._requests

    @property
    def size_bytes(self) -> int:
        """What it holds in memory, about."""
        return self._size_bytes

    def _holds(self, execution: Execution) -> bool:
        """Say whether it is still remembered; a run may outlive its deadline."""
        return execution.shelf.executions.get(execution.correlation) is execution

    def _grow(self, execution: Execution, size_bytes: int) -> None:
        execution.size_bytes += size_bytes
        execution.shelf.size_bytes += size_bytes
        self._size_bytes += size_bytes
        if self._size_bytes > self._max_bytes:
            self._make_room(execution.shelf)

    def _note(self, execution: Execution) -> Execution:
        shelf = execution.shelf
        shelf.executions[execution.correlation] = execution
        second = int(execution.deadline_s)
        ending = self._ending.get(second)
        if ending is None:
            self._ending[second] = {execution}
        else:
            ending.add(execution)
        self._requests += 1
        shelf.size_bytes += OVERHEAD_BYTES
        self._size_bytes += OVERHEAD_BYTES
        if self._requests > self._max_requests or self._size_bytes > self._max_bytes:
            self._make_room(shelf)
        return execution

    def _drop_ended(self, now_s: float) -> None:
        self._looked_at = int(now_s)
        for second in [second for second in self._ending if second < self._looked_at]:
            for execution in tuple(self._ending[second]):
                self.forget(execution)

    def _make_room(self, asking: "_Shelf") -> None:
        """Take the oldest from whoever has more than an equal share, first from who asks for more."""
        shelf: _Shelf | None = asking
        while shelf is not None and (self._requests > self._max_requests or self._size_bytes > self._max_bytes):
            oldest = shelf.oldest_done() if self._is_over_share(shelf) else None
            if oldest is None:
                shelf = self._next_over_share()
            else:
                self.forget(oldest)
                self._note_forgotten()

    def _is_over_share(self, shelf: "_Shelf") -> bool:
        clients = len(self._shelves)
        if self._requests > self._max_requests and len(shelf.executions) * clients > self._max_requests:
            return True
        return self._size_bytes > self._max_bytes and shelf.size_bytes * clients > self._max_bytes

    def _next_over_share(self) -> "_Shelf | None":
        """Return a client that can give something up; it stays the first to be looked at until it cannot."""
        for _ in range(len(self._shelves)):
            client, shelf = next(iter(self._shelves.items()))
            if self._is_over_share(shelf) and shelf.oldest_done() is not None:
                return shelf
            self._shelves.move_to_end(client)
        return None


class _Shelf:
    """What is remembered of one client, in order of arrival."""

    __slots__ = ("client", "executions", "size_bytes")

    def __init__(self, client: str) -> None:
        self.client = client
        self.executions: OrderedDict[bytes, Execution] = OrderedDict()
        self.size_bytes = 0

    def oldest_done(self) -> Execution | None:
        """Return the oldest that is not under way; those in front of it are few: the front bounds them."""
        return next((execution for execution in self.executions.values() if not execution.is_under_way), None)
