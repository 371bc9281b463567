"""A device that asks the nearest agent of its site over MQTT and waits for the reply.

    with DeviceClient("camera-1", site="berlin", broker=("127.0.0.1", 1883)) as device:
        reply = device.ask("digits", {"inputs": [...]}, deadline_s=2.0)

Agents are known by their retained status messages, and how near they are by probes and answers. A request goes to the
nearest that has the model and room; if that one refuses, goes away or stays silent, the time left is enough for the
next one, under the same correlation. Where no status is known, it goes to `any` agent.

A device sees one answer. One that comes after the deadline is counted as late, and a second one as a duplicate: another
agent was asked, and the first was merely slow. After the broker was away, what is unanswered is sent again, with the
time that is left; agents know a repeated correlation and run nothing twice.

At a broker that asks for certificates a device is called `{device}@{site}`, as its own certificate says, and that name
stands in the topic of each request:

    with DeviceClient("camera-1", site="berlin", broker=("broker.example", 8883), tls=folder_context(folder)) as device:

Safe to use from several threads; each `ask` blocks its own caller only.
"""

import random
import ssl
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from paho.mqtt.client import MQTTMessage

from edge_agent.client.connection import Connection
from edge_agent.client.directory import News, room_of
from edge_agent.client.exchanges import (
    ACCEPT_PROVISIONAL,
    Arrived,
    DeviceCounters,
    Event,
    Exchange,
    Exchanges,
    Happening,
    Kind,
)
from edge_agent.client.failover import Attempts, GiveUp, Send, Step, Wait
from edge_agent.client.messages import ELSEWHERE_STATUSES, Format, MalformedReply, NoReply, Protocol, Reply
from edge_agent.client.probing import TIMEOUT_S, Probing
from edge_agent.client.ranking import ANY_AGENT, Sight
from edge_agent.client.survey import Survey

# What a probe carries: the format wants a tensor, the agent does not look at it.
_PROBE_BODY = {"inputs": [{"name": "probe", "shape": [1], "datatype": "BOOL", "data": [False]}]}
_PROBE_WORDS = {"probe": "1"}
_HAPPENINGS = {
    News.BORN: Happening.AGENT_BORN,
    News.GONE: Happening.AGENT_GONE,
    News.CHANGED: Happening.AGENTS_CHANGED,
}
_MISSING = 404


class DeviceClient:
    """`client_id` is the device's name; with `tls`, what `nanofleet authority certify --role device` was given."""

    def __init__(
        self,
        client_id: str,
        *,
        site: str,
        broker: tuple[str, int],
        protocol: Protocol = Protocol.MQTT_5,
        tls: ssl.SSLContext | None = None,
        on_verdict: Callable[[Reply], None] | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            on_verdict: called, in the network's thread, with the heavy tier's verdict on a `deferrable` request that
                had its answer from the edge; its `correlation` is that of the first reply.
        """
        # As `core.broker_names` has it, without the libraries that come with that.
        self.client_id = client_id if tls is None else f"{client_id}@{site}"
        is_v5 = protocol is Protocol.MQTT_5
        self._format = Format(site, self.client_id, is_v5, names_client=tls is not None)
        self._exchanges = Exchanges()
        self._on_verdict = on_verdict
        # Guards the three below, which the network's thread and the callers share.
        self._lock = threading.Lock()
        self._survey = Survey(self.client_id, uniform=random.random)
        self._probing = Probing(uniform=random.random)
        # Probes under way, by correlation: whom, and when.
        self._probes: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._connection = Connection(
            self.client_id,
            broker=broker,
            is_v5=is_v5,
            tls=tls,
            filters=[self._format.statuses, self._format.replies],
            opened=self._on_open,
            received=self._on_message,
            turned=self._on_turn,
        )

    @property
    def counters(self) -> DeviceCounters:
        return self._exchanges.counters

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def connect(self, *, timeout_s: float = 10.0) -> None:
        """Connect and subscribe; afterwards the connection is made again whenever it is lost.

        Raises:
            NoReply: no broker, or no subscription, within `timeout_s`.
        """
        self._connection.start(timeout_s=timeout_s)

    def close(self) -> None:
        self._connection.close()

    def nearest(self, model: str) -> list[str]:
        """Return the agents in the order in which they would be asked about `model` now."""
        with self._lock:
            return [sight.agent for sight in self._survey.candidates(model, now_s=time.monotonic())]

    def ask(
        self,
        model: str,
        request: Mapping[str, Any],
        *,
        agent: str | None = None,
        deadline_s: float = 5.0,
        qos: int = 1,
        properties: Mapping[str, str] | None = None,
        on_provisional: Callable[[Reply], None] | None = None,
    ) -> Reply:
        """Send one Open Inference JSON request and return its reply.

        Args:
            request: `{"inputs": [...], ...}`, the body of an Open Inference `infer` call.
            agent: an agent's id, to ask nobody else; `any` for whichever agent of the site takes it; None for the
                nearest, and the others if that one fails.
            properties: further words for the request: `privacy`, `priority`, `deferrable`, `traceparent`.
            on_provisional: ask for the edge's answer at once, and be called with it, here, before the final one is
                returned.

        Returns:
            The final answer; a refusal if all agents refuse; the provisional answer if no final one came in time, or
            if the request is `deferrable` and the heavy tier is away.

        Raises:
            NoReply: nothing came before the deadline.
            MalformedReply: what came is not a JSON reply with a status.
        """
        ends_s = time.monotonic() + deadline_s
        if not self._connection.wait_open(deadline_s):
            raise NoReply(f"{model} at {_named(agent)}: expected the broker back within {deadline_s:g} s")
        words = {**(properties or {}), **({} if on_provisional is None else {ACCEPT_PROVISIONAL: "1"})}
        exchange = Exchange(
            correlation=uuid.uuid4().hex,
            model=model,
            body=request,
            words=words,
            qos=qos,
            ends_s=ends_s,
            agent=agent,
            attempts=Attempts(ends_s=ends_s),
        )
        self._exchanges.begin(exchange)
        try:
            reply = self._conduct(exchange, on_provisional)
        finally:
            self._exchanges.end(exchange)
        if reply is None:
            raise NoReply(f"{model} at {_named(agent)}: expected a reply within {deadline_s:g} s")
        return reply

    def _conduct(self, exchange: Exchange, on_provisional: Callable[[Reply], None] | None) -> Reply | None:
        """Take step after step until there is an answer, or none to come."""
        while True:
            now_s = time.monotonic()
            step = self._next_step(exchange, now_s)
            if isinstance(step, GiveUp):
                return exchange.provisional or exchange.refusal
            if isinstance(step, Send):
                self._send(exchange, step.agent, now_s)
                continue
            event = exchange.next_event(timeout_s=step.until_s - now_s)
            if isinstance(event, MalformedReply):
                raise event
            if isinstance(event, Event):
                _take_note(exchange, event)
            elif isinstance(event, Arrived):
                if exchange.settles(event.reply):
                    return event.reply
                self._consider(exchange, event.reply, on_provisional)

    def _next_step(self, exchange: Exchange, now_s: float) -> Step:
        if not self._connection.is_open and now_s < exchange.ends_s:
            # Nobody can be blamed for silence, and what is unanswered goes out again over the next connection.
            return Wait(exchange.ends_s)
        with self._lock:
            self._probing.active(now_s=now_s)
            if self._connection.is_open:
                for agent in exchange.attempts.overdue(now_s=now_s):
                    self._survey.silent(agent, now_s=now_s)
            step = exchange.attempts.next_step(self._candidates(exchange, now_s), now_s=now_s)
            if isinstance(step, Send) and exchange.agent is None:
                self._survey.chose(exchange.model, step.agent)
            return step

    def _candidates(self, exchange: Exchange, now_s: float) -> Sequence[Sight]:
        if exchange.agent is not None:
            return [Sight(exchange.agent)]
        return self._survey.candidates(exchange.model, now_s=now_s)

    def _send(self, exchange: Exchange, agent: str, now_s: float) -> None:
        self._exchanges.sent(exchange, agent, now_s=now_s)
        message = self._format.request(
            agent=agent,
            model=exchange.model,
            body=exchange.body,
            correlation=exchange.correlation,
            left_ms=max(1, round((exchange.ends_s - now_s) * 1000)),
            words=exchange.words,
        )
        self._connection.publish(message, qos=exchange.qos)

    def _consider(self, exchange: Exchange, reply: Reply, on_provisional: Callable[[Reply], None] | None) -> None:
        """Take a reply that is not the answer: a refusal, or an answer that a better one may follow."""
        now_s = time.monotonic()
        if reply.status in ELSEWHERE_STATUSES and reply.is_final:
            exchange.refusal = reply
            exchange.refusals += 1
            exchange.attempts.refused(_asked_as(exchange, reply), until_s=self._refused(exchange, reply, now_s))
            return
        exchange.attempts.answered_provisionally()
        if exchange.provisional is None:
            exchange.provisional = reply
            if on_provisional is not None:
                on_provisional(reply)

    def _refused(self, exchange: Exchange, reply: Reply, now_s: float) -> float:
        """Return until when the agent is not asked again about this request."""
        if reply.status == _MISSING:
            return float("inf")
        with self._lock:
            until_s = self._survey.refused(reply.agent, for_s=reply.retry_after_s, now_s=now_s)
        # Longer each time, so that the few attempts that a request has reach far.
        return now_s + (until_s - now_s) * 2.0 ** (exchange.refusals - 1)

    def _on_open(self) -> None:
        with self._lock:
            self._probes.clear()
            self._probing.active(now_s=time.monotonic())
        self._exchanges.tell(Event(Happening.RECONNECTED))

    def _on_message(self, message: MQTTMessage) -> None:
        now_s = time.monotonic()
        agent = self._format.agent_of(message.topic)
        if agent is not None:
            self._hear(agent, message)
            return
        correlation = self._format.correlation_of(message)
        try:
            reply = self._format.reply(message)
        except MalformedReply as error:
            self._exchanges.malformed(correlation, error)
            return
        with self._lock:
            probe = self._probes.pop(correlation, None)
            if probe is not None:
                self._survey.probed(probe[0], now_s - probe[1], room=room_of(reply.body.get("load")))
                return
        taken = self._exchanges.take(correlation, reply, now_s=now_s)
        with self._lock:
            # A refusal is quick, and says nothing of how long an answer takes.
            self._survey.answered(reply.agent, taken.round_trip_s if reply.status == 200 else None, now_s=now_s)
        if taken.kind is Kind.VERDICT and self._on_verdict is not None:
            self._on_verdict(reply)

    def _hear(self, agent: str, message: MQTTMessage) -> None:
        with self._lock:
            news = self._survey.hear(agent, bytes(message.payload), is_retained=message.retain)
            if news is News.BORN:
                self._probing.soon(agent)
        if news is not News.NOTHING:
            self._exchanges.tell(Event(_HAPPENINGS[news], agent))

    def _on_turn(self) -> None:
        now_s = time.monotonic()
        if not self._connection.is_open or not self._probing.is_time(now_s=now_s):
            return
        with self._lock:
            self._give_up_probes(now_s)
            due = [
                (agent, model)
                for agent in self._probing.due(self._survey.online(), now_s=now_s)
                if (model := self._survey.model_of(agent)) is not None
            ]
        for agent, model in due:
            self._probe(agent, model, now_s)

    def _give_up_probes(self, now_s: float) -> None:
        while self._probes and next(iter(self._probes.values()))[1] + TIMEOUT_S <= now_s:
            _, (agent, _) = self._probes.popitem(last=False)
            self._survey.silent(agent, now_s=now_s)
            self._probing.soon(agent)

    def _probe(self, agent: str, model: str, now_s: float) -> None:
        correlation = uuid.uuid4().hex
        with self._lock:
            self._probes[correlation] = (agent, now_s)
        message = self._format.request(
            agent=agent,
            model=model,
            body=_PROBE_BODY,
            correlation=correlation,
            left_ms=round(TIMEOUT_S * 1000),
            words=_PROBE_WORDS,
        )
        self._connection.publish(message, qos=0)


def _take_note(exchange: Exchange, event: Event) -> None:
    match event.happening:
        case Happening.RECONNECTED:
            exchange.attempts.reconnected()
        case Happening.AGENT_BORN:
            exchange.attempts.born(event.agent)
        case Happening.AGENT_GONE:
            # Who was asked by name may be back in time; the broker keeps the request for it.
            if exchange.agent is None:
                exchange.attempts.gone(event.agent)
        case Happening.AGENTS_CHANGED:
            # The next step looks at them anew.
            return


def _asked_as(exchange: Exchange, reply: Reply) -> str:
    """Return under which name the agent was asked that replies."""
    return reply.agent if reply.agent in exchange.sent_s else ANY_AGENT


def _named(agent: str | None) -> str:
    return "the nearest agent" if agent is None else agent
