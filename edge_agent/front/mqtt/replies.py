"""Replies on their way out: sent while the broker is there, kept while it is away, and kept until it has taken them.

A reply whose time has passed is never sent. What the broker had not acknowledged when a connection ended goes out again
over the next one.
"""

import asyncio

from core.clock import Clock
from edge_agent.front.mqtt.broker import Broker
from edge_agent.front.mqtt.counters import FrontCounters
from edge_agent.front.mqtt.wire import Reply

# Replies that wait for the broker, or for its word that it has them. Chosen: more than any in-flight bound, so that an
# outage loses none that has time.
_MAX_WAITING = 4096
# How often a reply that was not acknowledged goes out again: one that makes the broker hang up must not do so for ever.
_MAX_RESENT = 1


class Replies:
    """Sends through `broker`, which is made after this and tells it what has happened."""

    broker: Broker

    def __init__(self, counters: FrontCounters, *, clock: Clock) -> None:
        self._counters = counters
        self._now_s = clock.monotonic_s
        self._waiting: list[Reply] = []
        self._unacknowledged: dict[int, Reply] = {}
        self._all_acknowledged = asyncio.Event()
        self._all_acknowledged.set()

    def send(self, reply: Reply) -> None:
        now_s = self._now_s()
        if reply.deadline_s <= now_s or len(self._unacknowledged) >= _MAX_WAITING:
            self._counters.late += 1
        elif self.broker.is_online:
            self._publish(reply, now_s)
        elif len(self._waiting) < _MAX_WAITING:
            self._waiting.append(reply)
        else:
            self._counters.late += 1

    async def all_acknowledged(self) -> None:
        """Return when the broker has taken every QoS 1 reply that was sent over the connection, or that is over."""
        await self._all_acknowledged.wait()

    def acknowledged(self, packet_id: int) -> None:
        self._unacknowledged.pop(packet_id, None)
        if not self._unacknowledged:
            self._all_acknowledged.set()

    def keep_unacknowledged(self) -> None:
        """The connection is over: what the broker may not have got goes out again over the next one."""
        self._counters.replied -= len(self._unacknowledged)
        for reply in self._unacknowledged.values():
            if reply.attempts < _MAX_RESENT:
                self._waiting.append(reply._replace(attempts=reply.attempts + 1))
            else:
                self._counters.late += 1
        self._unacknowledged.clear()
        self._all_acknowledged.set()

    def send_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for reply in waiting:
            self.send(reply)

    def _publish(self, reply: Reply, now_s: float) -> None:
        packet_id = self.broker.publish(
            reply.topic, reply.payload, qos=reply.qos, properties=reply.properties_at(now_s)
        )
        self._counters.replied += 1
        if reply.qos:
            self._unacknowledged[packet_id] = reply
            self._all_acknowledged.clear()
