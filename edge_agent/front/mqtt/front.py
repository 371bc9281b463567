"""The MQTT face of the data plane: every message that is accepted gets one final reply or is counted as dropped.

    PUBLISH → address → envelope → duplicate? → decode → data plane → encode → reply
                                                             └── provisional: another answer, another reply
    a verdict that has waited for the heavy tier → its address → encode → reply

All of it runs in callbacks of the loop; a request costs one future and no task. What is known of one under way is its
`Exchange`; how replies get out, also over outages of the broker, is in `replies`.
"""

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict

from core.backoff import BackoffPolicy
from core.clock import Clock
from core.errors import DeadlineExceeded, InternalError, NanofleetError, Overloaded, TooLarge, Unavailable
from core.ids import AgentId, SiteId
from core.logs import peer_text, withheld
from core.metrics import Registry
from core.open_inference.messages import BodyLimits, InferRequest, InferResponse
from edge_agent.answer import Answer
from edge_agent.cascade.policy import Tier
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.mqtt.broker import Broker, BrokerState
from edge_agent.front.mqtt.connection import ConnectionSettings
from edge_agent.front.mqtt.counters import FrontCounters
from edge_agent.front.mqtt.duplicates import Duplicates, Execution
from edge_agent.front.mqtt.envelope import Address, Envelope
from edge_agent.front.mqtt.exchange import Exchange
from edge_agent.front.mqtt.in_flight import InFlight
from edge_agent.front.mqtt.late_address import decode_late_address
from edge_agent.front.mqtt.message_metrics import MessageMetrics
from edge_agent.front.mqtt.probes import Load, asks_for_load, encode_load, watch
from edge_agent.front.mqtt.publication import Publication
from edge_agent.front.mqtt.replies import Replies
from edge_agent.front.mqtt.tls import BrokerTls
from edge_agent.front.mqtt.topics import DropCause, Topics, Undeliverable
from edge_agent.front.mqtt.wire import Reply, Wire
from edge_agent.runtime.berth import Phase
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import MqttSettings

_log = logging.getLogger(__name__)

# How long after a connect messages may be older than the connection. Chosen: the broker sends what it kept at once.
_BACKLOG_S = 2.0


class MqttFront:
    def __init__(
        self,
        settings: MqttSettings,
        *,
        site: SiteId,
        agent: AgentId,
        plane: EdgeDataPlane,
        pool: ModelPool,
        clock: Clock,
        faces: Mapping[str, str] | None = None,
        tls: BrokerTls | None = None,
        metrics: Registry | None = None,
    ) -> None:
        """`metrics` None: what is measured is nobody's to see."""
        self.counters = FrontCounters()
        self._measured = MessageMetrics(metrics or Registry())
        self._settings = settings
        self._agent = agent
        self._plane = plane
        self._pool = pool
        self._clock = clock
        # Other ways to this agent, by protocol; they stand in the status message.
        self._faces = dict(faces or {})
        self._topics = Topics(site, agent, requires_client=settings.requires_client, shared_by=settings.share_group)
        self._wire = Wire(self._topics, agent=agent, limits=BodyLimits(max_body_bytes=settings.max_body_bytes))
        self._duplicates = Duplicates(
            max_requests=settings.remembered_replies,
            max_bytes=settings.remembered_bytes,
            note_forgotten=self.counters.note_forgotten,
        )
        self._in_flight = InFlight(settings.max_in_flight)
        self._is_draining = False
        # Infinite while the connection is not open: the broker sends what it kept before that.
        self._online_since_s = math.inf
        self._replies = Replies(self.counters, clock=clock)
        self._warned: set[DropCause] = set()
        self._broker = Broker(
            _connection_settings(settings, self._topics, agent, tls),
            status_topic=self._topics.status,
            describe=self._describe,
            receive=self.receive,
            acknowledged=self._replies.acknowledged,
            opened=self._opened,
            closed=self._closed,
            backoff=BackoffPolicy(settings.reconnect_base_s, settings.reconnect_cap_s),
            clock=clock,
        )
        self._replies.broker = self._broker
        pool.on_change(self.announce)

    @property
    def state(self) -> BrokerState:
        return self._broker.state

    @property
    def last_error(self) -> str | None:
        """Why the broker is away; None while it is not."""
        return self._broker.last_error

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._broker.run(), name="mqtt broker")
            group.create_task(watch(self._load, self.announce), name="mqtt load")

    def announce(self) -> None:
        """Publish the agent's status anew, because a model or a face has changed."""
        self._broker.announce()

    def status(self) -> Mapping[str, object]:
        """Return what the status file says of this face."""
        return {
            "state": self.state.value,
            "last_error": self.last_error,
            "in_flight": self.in_flight,
            "counters": asdict(self.counters),
        }

    async def drain(self) -> None:
        """Take no more requests and return when all that were taken are answered; the caller sets the limit.

        The broker has taken the QoS 1 replies then: those over its Receive Maximum still wait on our side of the
        connection, and a goodbye would discard them.
        """
        self._is_draining = True
        while self._in_flight:
            await asyncio.wait([exchange.future for exchange in self._in_flight if exchange.future is not None])
        # Once is enough: what comes now is refused, and refusals must not keep a busy agent from stopping.
        await self._replies.all_acknowledged()

    def receive(self, publication: Publication) -> None:
        """Take one message; never raises."""
        self.counters.received += 1
        try:
            address = self._wire.address_of(publication)
        except Undeliverable as refusal:
            self._drop(refusal)
            return
        exchange = Exchange(publication, address, self._clock.monotonic_s(), self._agent, self.settle)
        try:
            self._serve(exchange)
        except Exception as error:
            self._refuse(exchange, error)

    def settle(self, exchange: Exchange, future: "asyncio.Future[Answer]") -> None:
        """Reply with what has become of a request that was under way; never raises."""
        self._in_flight.discard(exchange)
        if future.cancelled():
            self._forget(exchange)
            return
        failure = future.exception()
        if isinstance(failure, NanofleetError):
            self._refuse(exchange, failure)
            return
        try:
            answer = future.result()
            if answer.later is not None:
                self._follow(exchange, answer.later)
            self._answer(exchange, answer)
        except Exception as error:
            if exchange.future is not None:
                # A provisional answer that cannot be sent: what would follow is of no use either.
                exchange.future.cancel()
            self._refuse(exchange, error)

    def deliver(self, reply_to: bytes, response: InferResponse) -> None:
        """Send a verdict that has waited for the heavy tier; implements `VerdictSink`."""
        try:
            late = decode_late_address(reply_to, self._topics)
        except NanofleetError as error:
            self.counters.unreadable_address += 1
            _log.warning("a late verdict cannot be sent", extra={"cause": type(error).__name__})
            return
        now_s = self._clock.monotonic_s()
        # The request's own deadline is long over.
        deadline_s = now_s + self._settings.verdict_expiry_s
        answer = Answer(response, Tier.HEAVY, late.reason, late.confidence)
        try:
            reply = self._encode(late.address, late.request, late.content_type, answer, late.qos, deadline_s)
        except Exception as error:
            refusal = self._refusal(error, late.address.model)
            reply = self._wire.encode_refusal(late.address, refusal, qos=late.qos, deadline_s=deadline_s)
        self.counters.verdicts += 1
        self._duplicates.follow_up(late.address.client, late.address.correlation, reply)
        self._replies.send(reply)

    def _follow(self, exchange: Exchange, future: "asyncio.Future[Answer]") -> None:
        exchange.follow(future)
        self._in_flight.add(exchange)

    def _answer(self, exchange: Exchange, answer: Answer) -> None:
        reply = self._encode(
            exchange.address, exchange.request, exchange.content_type, answer, exchange.qos, exchange.deadline_s
        )
        now_s = self._clock.monotonic_s()
        if not answer.is_final:
            self.counters.provisional += 1
        self._remember(exchange, reply, answer)
        self._replies.send(reply)
        # The whole way is measured once.
        if answer.later is None:
            self._measured.processed(now_s - exchange.received_s)

    def _encode(
        self, address: Address, request: InferRequest, content_type: str, answer: Answer, qos: int, deadline_s: float
    ) -> Reply:
        reply = self._wire.encode_answer(address, request, content_type, answer, qos=qos, deadline_s=deadline_s)
        if reply.packet_bytes > self._broker.max_packet_bytes:
            raise TooLarge(
                f"reply: expected at most {self._broker.max_packet_bytes} bytes, as the broker takes, "
                f"got {reply.packet_bytes}; ask for fewer outputs or in a binary encoding"
            )
        return reply

    def _refuse(self, exchange: Exchange, error: Exception) -> None:
        error = self._refusal(error, exchange.address.model)
        self._measured.processed(self._clock.monotonic_s() - exchange.received_s, error)
        if not exchange.is_asked:
            self._plane.metrics.failed("", error)
        if isinstance(error, DeadlineExceeded):
            self._forget(exchange)
            self.counters.expired += 1
            return
        self.counters.refused += 1
        reply = self._wire.encode_refusal(exchange.address, error, qos=exchange.qos, deadline_s=exchange.deadline_s)
        if error.retryable:
            self._forget(exchange)
        else:
            self._remember(exchange, reply)
        self._replies.send(reply)

    def _refusal(self, error: Exception, model: str) -> NanofleetError:
        if isinstance(error, NanofleetError):
            return error
        _log.error("a request failed by a defect", extra={"model": model}, exc_info=withheld(error))
        return InternalError("internal error; the agent's log has the cause")

    def _serve(self, exchange: Exchange) -> None:
        if exchange.address.is_v5 and exchange.publication.expiry_s is None and self._may_be_backlog(exchange):
            raise DeadlineExceeded("nothing tells how long the message has waited in the broker")
        envelope = self._wire.open_request(exchange.publication, exchange.address)
        now_s = exchange.open(envelope)
        if envelope.remaining_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the message came")
        if envelope.probe is not None and asks_for_load(envelope.probe):
            self._answer_probe(exchange)
            return
        if not self._is_fresh(exchange, envelope, now_s):
            return
        if self._is_draining:
            raise Unavailable("the agent is stopping; try again later")
        if not self._in_flight.has_place_for(exchange.address.client):
            raise Overloaded(f"{len(self._in_flight)} requests are under way; try again later")
        request = self._wire.decode(exchange.publication, exchange.address, envelope)
        call = exchange.admit(request, envelope)
        exchange.is_asked = True
        self._follow(exchange, self._plane.ask(request, call, envelope.terms, origin=exchange, mailbox=exchange))

    def _answer_probe(self, exchange: Exchange) -> None:
        if self._is_draining:
            raise Unavailable("the agent is stopping; try again later")
        self.counters.probes += 1
        reply = encode_load(exchange.address, self._load(), agent=self._agent, deadline_s=exchange.deadline_s)
        self._replies.send(reply)

    def _load(self) -> Load:
        room = max(0, self._settings.max_in_flight - self.in_flight)
        return Load(self.in_flight, self._pool.queued, 0 if self._is_draining else room)

    def _may_be_backlog(self, exchange: Exchange) -> bool:
        return exchange.received_s - self._online_since_s < _BACKLOG_S

    def _is_fresh(self, exchange: Exchange, envelope: Envelope, now_s: float) -> bool:
        address = exchange.address
        seen = self._duplicates.begin(
            address.client,
            address.correlation,
            content=exchange.content_hash(envelope),
            deadline_s=exchange.deadline_s,
            now_s=now_s,
        )
        if isinstance(seen, Execution):
            exchange.execution = seen
            return True
        self.counters.duplicates += 1
        for reply in seen:
            self._replies.send(reply)
        return False

    def _remember(self, exchange: Exchange, reply: Reply, answer: Answer | None = None) -> None:
        """Keep a reply for when its request comes again; `answer` None: it is a refusal for good."""
        if exchange.execution is None:
            return
        if answer is None or answer.is_final:
            self._duplicates.finish(exchange.execution, reply)
        else:
            self._duplicates.note_provisional(exchange.execution, reply, is_under_way=answer.later is not None)

    def _forget(self, exchange: Exchange) -> None:
        if exchange.execution is not None:
            self._duplicates.forget(exchange.execution)

    def _opened(self) -> None:
        self._online_since_s = self._clock.monotonic_s()
        self._replies.send_waiting()

    def _closed(self) -> None:
        self._online_since_s = math.inf
        self._replies.keep_unacknowledged()

    def _drop(self, refusal: Undeliverable) -> None:
        name = refusal.cause.value
        setattr(self.counters, name, getattr(self.counters, name) + 1)
        level = logging.DEBUG if refusal.cause in self._warned else logging.WARNING
        self._warned.add(refusal.cause)
        _log.log(level, "a message cannot be answered", extra={"cause": name, "detail": peer_text(str(refusal))})

    def _describe(self) -> Mapping[str, object]:
        return {
            "models": [
                {
                    "name": model.manifest.model,
                    "version": model.version,
                    "variant": model.manifest.variant,
                    "resident": self._pool.residency(model.manifest.model).phase is Phase.RESIDENT,
                }
                for model in self._pool.models()
            ],
            "load": self._load().to_json(),
            "faces": self._faces,
        }


def _connection_settings(
    settings: MqttSettings, topics: Topics, agent: AgentId, tls: BrokerTls | None
) -> ConnectionSettings:
    is_v5 = settings.protocol == 5
    return ConnectionSettings(
        host=settings.host,
        port=settings.port,
        tls=tls,
        client_id=f"nf-agent-{agent}",
        is_v5=is_v5,
        keepalive_s=settings.keepalive_s,
        filters=topics.filters(is_v5=is_v5),
        receive_maximum=min(settings.max_in_flight, 65535),
        # A body that is a little too large is told so; one that is far too large never leaves the broker.
        max_packet_bytes=min(4 * settings.max_body_bytes + (1 << 16), (1 << 28) - 1),
    )
