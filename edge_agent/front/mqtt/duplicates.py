"""One execution per request: a QoS 1 message that the broker delivers again finds its reply, or that it is under way.

Keyed by (client, correlation data) until the request's deadline; bounded in entries and in bytes of stored replies, the
oldest going first. QoS 0 messages are never delivered again and are not remembered.
"""

from collections import OrderedDict
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
        # In order of arrival; the value is (deadline, reply or None while in flight).
        self._requests: OrderedDict[Key, tuple[float, Reply | None]] = OrderedDict()
        self._size_bytes = 0

    def begin(self, key: Key, *, deadline_s: float, now_s: float) -> Progress | Reply:
        """Note a request; return FRESH if it is to be run, else what has become of it."""
        known = self._requests.get(key)
        if known is not None and known[0] > now_s:
            return known[1] or Progress.IN_FLIGHT
        self.forget(key)
        self._requests[key] = (deadline_s, None)
        self._make_room(now_s)
        return Progress.FRESH

    def finish(self, key: Key, reply: Reply, *, now_s: float) -> None:
        """Store the reply of a request that was begun."""
        known = self._requests.get(key)
        if known is not None and known[1] is None:
            self._requests[key] = (known[0], reply)
            self._size_bytes += reply.size_bytes
            self._make_room(now_s)

    def forget(self, key: Key) -> None:
        """Let the request be run again, for example because it was refused only for now."""
        known = self._requests.pop(key, None)
        if known is not None and known[1] is not None:
            self._size_bytes -= known[1].size_bytes

    def __len__(self) -> int:
        return len(self._requests)

    def _make_room(self, now_s: float) -> None:
        while self._requests:
            oldest = next(iter(self._requests))
            is_over = len(self._requests) > self._max_entries or self._size_bytes > self._max_bytes
            if not is_over and self._requests[oldest][0] > now_s:
                return
            self.forget(oldest)
