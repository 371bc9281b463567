"""One execution per request: a QoS 1 message that the broker delivers again finds its reply, or that it is under way.

A request with a provisional answer finds that one and, once it was sent, the final one.

Keyed by (client, correlation data) until the request's deadline; bounded in entries and in bytes of stored replies, the
oldest going first. QoS 0 messages are never delivered again and are not remembered.
"""

from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

from edge_agent.front.mqtt.wire import Reply

Key = tuple[str, bytes]


class Progress(Enum):
    """What is known of a request that has no reply yet."""

    FRESH = "fresh"
    IN_FLIGHT = "in_flight"


class Duplicates:
    def __init__(self, *, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        # In order of arrival; the value is (deadline, provisional reply, final reply), each None until it was sent.
        self._requests: OrderedDict[Key, tuple[float, Reply | None, Reply | None]] = OrderedDict()
        self._size_bytes = 0

    def begin(self, key: Key, *, deadline_s: float, now_s: float) -> Progress | Sequence[Reply]:
        """Note a request; return FRESH if it is to be run, else what has become of it."""
        known = self._requests.get(key)
        if known is not None and known[0] > now_s:
            return [reply for reply in known[1:] if reply is not None] or Progress.IN_FLIGHT
        self.forget(key)
        self._requests[key] = (deadline_s, None, None)
        self._make_room(now_s)
        return Progress.FRESH

    def finish(self, key: Key, reply: Reply, *, now_s: float) -> None:
        """Store the reply of a request that was begun."""
        known = self._requests.get(key)
        if known is not None and known[2] is None:
            self._requests[key] = (known[0], known[1], reply)
            self._size_bytes += reply.size_bytes
            self._make_room(now_s)

    def note_provisional(self, key: Key, reply: Reply, *, now_s: float) -> None:
        """Store a reply that another one follows, in the place of an earlier one of the kind."""
        known = self._requests.get(key)
        if known is not None and known[2] is None:
            self._size_bytes += reply.size_bytes - (0 if known[1] is None else known[1].size_bytes)
            self._requests[key] = (known[0], reply, None)
            self._make_room(now_s)

    def follow_up(self, key: Key, reply: Reply, *, now_s: float) -> None:
        """Store the final reply behind a provisional one; a request of the same key that has none is another one."""
        known = self._requests.get(key)
        if known is not None and known[1] is not None:
            self.finish(key, reply, now_s=now_s)

    def forget(self, key: Key) -> None:
        """Let the request be run again, for example because it was refused only for now."""
        known = self._requests.pop(key, None)
        if known is not None:
            self._size_bytes -= sum([reply.size_bytes for reply in known[1:] if reply is not None])

    def __len__(self) -> int:
        return len(self._requests)

    def _make_room(self, now_s: float) -> None:
        while self._requests:
            oldest = next(iter(self._requests))
            is_over = len(self._requests) > self._max_entries or self._size_bytes > self._max_bytes
            if not is_over and self._requests[oldest][0] > now_s:
                return
            self.forget(oldest)
