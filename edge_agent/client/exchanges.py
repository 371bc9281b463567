"""The requests under way of one device, and which reply belongs to which.

Replies come in the network's thread and requests wait in their callers', so everything here is locked by one lock.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from edge_agent.client.failover import Attempts
from edge_agent.client.messages import ELSEWHERE_STATUSES, MalformedReply, Reply

ACCEPT_PROVISIONAL = "accept-provisional"
# The reason of a provisional answer whose better one is being made.
AT_WORK = "low_confidence"
# Requests remembered after their end, to tell a duplicate and a late reply from a stranger.
REMEMBERED = 4096
# What one caller has not looked at yet, beside its answer; chosen: far above what its agents send.
_MAX_UNREAD = 256


@dataclass(slots=True)
class DeviceCounters:
    """What came that nobody waited for, and what may be the cause of it."""

    late: int = 0
    duplicates: int = 0
    strangers: int = 0
    # Messages that followed the first of their request, to the same agent or to another.
    repeats: int = 0


class Happening(Enum):
    """What may change what to do about a request, beside a reply to it."""

    RECONNECTED = "reconnected"
    AGENT_BORN = "agent_born"
    AGENT_GONE = "agent_gone"
    AGENTS_CHANGED = "agents_changed"


@dataclass(frozen=True, slots=True)
class Event:
    happening: Happening
    agent: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    reply: Reply


@dataclass(slots=True, eq=False)
class Exchange:
    """One request, from its first message to its end."""

    correlation: str
    model: str
    body: Mapping[str, object]
    words: Mapping[str, str]
    qos: int
    ends_s: float
    # Asked by name: nobody else is.
    agent: str | None
    attempts: Attempts
    inbox: "queue.SimpleQueue[Arrived | MalformedReply | Event]" = field(default_factory=queue.SimpleQueue)
    # Per agent: when it was sent; None: more than once, so that nobody knows which was answered (Karn's algorithm).
    sent_s: dict[str, float | None] = field(default_factory=dict)
    # The answer is there; what comes now is a duplicate.
    is_settled: bool = False
    # Its answer was not final: what comes now is the heavy tier's verdict.
    awaits_verdict: bool = False
    provisional: Reply | None = None
    refusal: Reply | None = None
    refusals: int = 0

    def put(self, event: "Arrived | MalformedReply | Event") -> None:
        if self.is_settled or self.inbox.qsize() < _MAX_UNREAD:
            self.inbox.put(event)

    def next_event(self, *, timeout_s: float) -> "Arrived | MalformedReply | Event | None":
        """Return what has happened, or None after `timeout_s`."""
        try:
            return self.inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def settles(self, reply: Reply) -> bool:
        """Say whether the caller gets this: no refusal that another agent may not share, and nothing better comes.

        An answer that is not final is waited for only when the heavy tier is at work on it. Where it is away, and the
        request may wait for it, its verdict comes when it comes.
        """
        if not reply.is_final:
            return ACCEPT_PROVISIONAL not in self.words or reply.reason != AT_WORK
        return self.agent is not None or reply.status not in ELSEWHERE_STATUSES


@dataclass(frozen=True, slots=True)
class _Past:
    was_answered: bool
    awaits_verdict: bool
    sent_s: Mapping[str, float | None]


class Kind(Enum):
    """What a reply was."""

    ANSWER = "answer"
    # Of the heavy tier, on a request that has had an answer already.
    VERDICT = "verdict"
    UNWANTED = "unwanted"


class Taken(NamedTuple):
    kind: Kind
    # None: it tells of none.
    round_trip_s: float | None


class Exchanges:
    def __init__(self) -> None:
        self.counters = DeviceCounters()
        self._lock = threading.Lock()
        self._under_way: dict[str, Exchange] = {}
        self._past: OrderedDict[str, _Past] = OrderedDict()

    def begin(self, exchange: Exchange) -> None:
        with self._lock:
            self._under_way[exchange.correlation] = exchange

    def sent(self, exchange: Exchange, agent: str, *, now_s: float) -> None:
        """Note a message before it goes out; what is sent more than once may be answered more than once."""
        with self._lock:
            self.counters.repeats += bool(exchange.sent_s)
            exchange.sent_s[agent] = None if agent in exchange.sent_s else now_s

    def end(self, exchange: Exchange) -> None:
        """Forget a request but for what tells later replies to it from others."""
        with self._lock:
            del self._under_way[exchange.correlation]
            was_answered = exchange.is_settled or exchange.provisional is not None or exchange.refusal is not None
            awaits_verdict = exchange.awaits_verdict or (exchange.provisional is not None and not exchange.is_settled)
            self._past[exchange.correlation] = _Past(was_answered, awaits_verdict, exchange.sent_s)
            while len(self._past) > REMEMBERED:
                self._past.popitem(last=False)

    def tell(self, event: Event) -> None:
        """Let every request under way know."""
        with self._lock:
            for exchange in self._under_way.values():
                if not exchange.is_settled:
                    exchange.put(event)

    def malformed(self, correlation: str, error: MalformedReply) -> None:
        """Let the request know that what came is no reply."""
        with self._lock:
            exchange = self._under_way.get(correlation)
            if exchange is None or exchange.is_settled:
                self._count(correlation)
                return
            exchange.is_settled = True
            exchange.put(error)

    def take(self, correlation: str, reply: Reply, *, now_s: float) -> Taken:
        """Give a reply to its request, or count it."""
        with self._lock:
            exchange = self._under_way.get(correlation)
            if exchange is not None and not exchange.is_settled:
                exchange.is_settled = exchange.settles(reply)
                exchange.awaits_verdict = exchange.is_settled and not reply.is_final
                exchange.put(Arrived(reply))
                return Taken(Kind.ANSWER, _round_trip_s(exchange.sent_s, reply.agent, now_s))
            if reply.is_final and self._is_verdict(correlation):
                return Taken(Kind.VERDICT, None)
            return Taken(Kind.UNWANTED, _round_trip_s(self._count(correlation), reply.agent, now_s))

    def _is_verdict(self, correlation: str) -> bool:
        """Say whether a verdict on this request is awaited; it is no more."""
        exchange, past = self._under_way.get(correlation), self._past.get(correlation)
        if exchange is not None:
            is_awaited, exchange.awaits_verdict = exchange.awaits_verdict, False
            return is_awaited
        if past is None or not past.awaits_verdict:
            return False
        self._past[correlation] = _Past(past.was_answered, False, past.sent_s)
        return True

    def _count(self, correlation: str) -> Mapping[str, float | None]:
        """Count a reply that nobody waits for; return when its request was sent, and to whom."""
        exchange, past = self._under_way.get(correlation), self._past.get(correlation)
        if exchange is not None:
            self.counters.duplicates += 1
            return exchange.sent_s
        if past is None:
            self.counters.strangers += 1
            return {}
        if past.was_answered:
            self.counters.duplicates += 1
        else:
            self.counters.late += 1
        return past.sent_s


def _round_trip_s(sent_s: Mapping[str, float | None], agent: str, now_s: float) -> float | None:
    at_s = sent_s.get(agent)
    return None if at_s is None else now_s - at_s
