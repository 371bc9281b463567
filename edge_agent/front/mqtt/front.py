"""The MQTT face of the data plane: every message that is accepted gets one reply or is counted as dropped.

    PUBLISH → address → envelope → duplicate? → decode → data plane → encode → reply

All of it runs in callbacks of the loop; a request costs one future and no task. While the broker is away, replies wait
until it is back or their deadline passes; so do QoS 1 replies that it had not acknowledged.
"""

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from opentelemetry.trace import SpanKind

from core.backoff import BackoffPolicy
from core.clock import Clock
from core.deadline import Deadline
from core.errors import DeadlineExceeded, InternalError, NanofleetError, Overloaded, TooLarge, Unavailable
from core.ids import AgentId, SiteId
from core.logs import peer_text
from core.metrics import Registry
from core.open_inference.messages import BodyLimits, InferRequest
from core.open_inference.service import Call
from edge_agent.data_plane import Answer, EdgeDataPlane
from edge_agent.front.mqtt.broker import Broker, BrokerState
from edge_agent.front.mqtt.connection import ConnectionSettings
from edge_agent.front.mqtt.duplicates import Duplicates, Progress
from edge_agent.front.mqtt.message_metrics import MessageMetrics
from edge_agent.front.mqtt.publication import Publication
from edge_agent.front.mqtt.tls import BrokerTls
from edge_agent.front.mqtt.topics import DropCause, Topics, Undeliverable, template_of
from edge_agent.front.mqtt.wire import DEFAULT_DEADLINE_S, Address, Envelope, Reply, Wire, within_timeout
from edge_agent.request_trace import Attribute
from edge_agent.runtime.berth import Phase
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import MqttSettings

_log = logging.getLogger(__name__)

# Replies that wait for the broker. Chosen: more than any in-flight bound, so that an outage loses none that has time.
_MAX_WAITING = 4096
# How often a reply that was not acknowledged goes out again: one that makes the broker hang up must not do so for ever.
_MAX_RESENT = 1
# How long after a connect messages may be older than the connection. Chosen: the broker sends what it kept at once.
_BACKLOG_S = 2.0


@dataclass(slots=True)
class FrontCounters:
    """What became of the messages that came in; for the agent's status."""

    received: int = 0
    replied: int = 0
    refused: int = 0
    duplicates: int = 0
    # Came too late, or their deadline passed in the queue: never answered.
    expired: int = 0
    # Answered, but not in time to be sent.
    late: int = 0
    malformed_topic: int = 0
    missing_response_topic: int = 0
    foreign_response_topic: int = 0
    unnamed_client: int = 0
    retained: int = 0


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
        self._plane = plane
        self._pool = pool
        self._clock = clock
        # Other ways to this agent, by protocol; they stand in the status message.
        self._faces = dict(faces or {})
        self._topics = Topics(site, agent, requires_client=settings.requires_client, shared_by=settings.share_group)
        self._wire = Wire(self._topics, agent=agent, limits=BodyLimits(max_body_bytes=settings.max_body_bytes))
        self._duplicates = Duplicates(max_entries=settings.remembered_replies, max_bytes=settings.remembered_bytes)
        self._in_flight: set[_Exchange] = set()
        self._is_draining = False
        # Infinite while the connection is not open: the broker sends what it kept before that.
        self._online_since_s = math.inf
        self._waiting: list[Reply] = []
        self._unacknowledged: dict[int, Reply] = {}
        self._all_acknowledged = asyncio.Event()
        self._all_acknowledged.set()
        self._warned: set[DropCause] = set()
        self._broker = Broker(
            _connection_settings(settings, self._topics, agent, tls),
            status_topic=self._topics.status,
            describe=self._describe,
            receive=self.receive,
            acknowledged=self._acknowledged,
            opened=self._send_waiting,
            closed=self._keep_unacknowledged,
            backoff=BackoffPolicy(settings.reconnect_base_s, settings.reconnect_cap_s),
            clock=clock,
        )
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
        await self._broker.run()

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
        await self._all_acknowledged.wait()

    def receive(self, publication: Publication) -> None:
        """Take one message; never raises."""
        self.counters.received += 1
        try:
            address = self._wire.address_of(publication)
        except Undeliverable as refusal:
            self._drop(refusal)
            return
        exchange = _Exchange(self, publication, address, self._clock.monotonic_s())
        try:
            self._serve(exchange)
        except Exception as error:
            self._refuse(exchange, error)

    def settle(self, exchange: "_Exchange", future: "asyncio.Future[Answer]") -> None:
        """Reply with what has become of a request that was under way; never raises."""
        self._in_flight.discard(exchange)
        if future.cancelled():
            return
        try:
            self._answer(exchange, future.result())
        except Exception as error:
            self._refuse(exchange, error)

    def _answer(self, exchange: "_Exchange", answer: Answer) -> None:
        reply = self._wire.encode_answer(
            exchange.address,
            exchange.request,
            exchange.content_type,
            answer,
            qos=exchange.qos,
            deadline_s=exchange.deadline_s,
        )
        if reply.packet_bytes > self._broker.max_packet_bytes:
            raise TooLarge(
                f"reply: expected at most {self._broker.max_packet_bytes} bytes, as the broker takes, "
                f"got {reply.packet_bytes}; ask for fewer outputs or in a binary encoding"
            )
        now_s = self._clock.monotonic_s()
        if exchange.qos:
            self._duplicates.finish(exchange.key, reply, now_s=now_s)
        self._send(reply)
        self._measured.processed(now_s - exchange.received_s)

    def _refuse(self, exchange: "_Exchange", error: Exception) -> None:
        if not isinstance(error, NanofleetError):
            _log.error("a request failed by a defect", extra={"model": exchange.address.model}, exc_info=error)
            error = InternalError("internal error; the agent's log has the cause")
        self._measured.processed(self._clock.monotonic_s() - exchange.received_s, error)
        if not exchange.is_asked:
            self._plane.metrics.failed("", error)
        if isinstance(error, DeadlineExceeded):
            self.counters.expired += 1
            return
        self.counters.refused += 1
        reply = self._wire.encode_refusal(exchange.address, error, qos=exchange.qos, deadline_s=exchange.deadline_s)
        if exchange.is_noted and error.retryable:
            self._duplicates.forget(exchange.key)
        elif exchange.is_noted:
            self._duplicates.finish(exchange.key, reply, now_s=self._clock.monotonic_s())
        self._send(reply)

    def _serve(self, exchange: "_Exchange") -> None:
        if exchange.address.is_v5 and exchange.publication.expiry_s is None and self._may_be_backlog(exchange):
            raise DeadlineExceeded("nothing tells how long the message has waited in the broker")
        envelope = self._wire.open_request(exchange.publication, exchange.address)
        now_s = exchange.open(envelope)
        if envelope.remaining_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the message came")
        if exchange.qos and not self._is_fresh(exchange, now_s):
            return
        if self._is_draining:
            raise Unavailable("the agent is stopping; try again later")
        if len(self._in_flight) >= self._settings.max_in_flight:
            raise Overloaded(f"{len(self._in_flight)} requests are under way; try again later")
        request = self._wire.decode(exchange.publication, exchange.address, envelope)
        call = exchange.admit(request, envelope)
        exchange.is_asked = True
        exchange.future = self._plane.ask(request, call, envelope.terms, origin=exchange)
        self._in_flight.add(exchange)
        exchange.future.add_done_callback(exchange.settle)

    def _may_be_backlog(self, exchange: "_Exchange") -> bool:
        return exchange.received_s - self._online_since_s < _BACKLOG_S

    def _is_fresh(self, exchange: "_Exchange", now_s: float) -> bool:
        seen = self._duplicates.begin(exchange.key, deadline_s=exchange.deadline_s, now_s=now_s)
        if seen is Progress.FRESH:
            exchange.is_noted = True
            return True
        self.counters.duplicates += 1
        if isinstance(seen, Reply):
            self._send(seen)
        return False

    def _send(self, reply: Reply) -> None:
        now_s = self._clock.monotonic_s()
        if reply.deadline_s <= now_s:
            self.counters.late += 1
        elif self._broker.is_online:
            self._publish(reply, now_s)
        elif len(self._waiting) < _MAX_WAITING:
            self._waiting.append(reply)
        else:
            self.counters.late += 1

    def _publish(self, reply: Reply, now_s: float) -> None:
        packet_id = self._broker.publish(
            reply.topic, reply.payload, qos=reply.qos, properties=reply.properties_at(now_s)
        )
        self.counters.replied += 1
        if reply.qos:
            self._unacknowledged[packet_id] = reply
            self._all_acknowledged.clear()

    def _acknowledged(self, packet_id: int) -> None:
        self._unacknowledged.pop(packet_id, None)
        if not self._unacknowledged:
            self._all_acknowledged.set()

    def _keep_unacknowledged(self) -> None:
        """The connection is over: what the broker may not have got goes out again over the next one."""
        self._online_since_s = math.inf
        self.counters.replied -= len(self._unacknowledged)
        for reply in self._unacknowledged.values():
            if reply.attempts < _MAX_RESENT:
                self._waiting.append(reply._replace(attempts=reply.attempts + 1))
            else:
                self.counters.late += 1
        self._unacknowledged.clear()
        self._all_acknowledged.set()

    def _send_waiting(self) -> None:
        self._online_since_s = self._clock.monotonic_s()
        waiting, self._waiting = self._waiting, []
        for reply in waiting:
            self._send(reply)

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
            "load": {"in_flight": self.in_flight, "queued": self._pool.queued},
            "faces": self._faces,
        }


class _Exchange:
    """One request that can be answered, until it is; the Origin of its spans."""

    __slots__ = (
        "_front",
        "address",
        "content_type",
        "deadline_s",
        "future",
        "is_asked",
        "is_noted",
        "publication",
        "qos",
        "received_s",
        "request",
    )

    operation = "process"
    span_kind = SpanKind.CONSUMER

    def __init__(self, front: MqttFront, publication: Publication, address: Address, received_s: float) -> None:
        self._front = front
        self.publication = publication
        self.address = address
        self.received_s = received_s
        self.qos = publication.qos
        # Until the envelope is open: a refusal of a malformed one must still be sent.
        self.deadline_s = received_s + DEFAULT_DEADLINE_S
        self.content_type = ""
        self.is_noted = False
        # From then on the data plane counts what becomes of it.
        self.is_asked = False
        self.future: asyncio.Future[Answer] | None = None
        self.request: InferRequest

    @property
    def key(self) -> tuple[str, bytes]:
        return self.address.client, self.address.correlation

    def open(self, envelope: Envelope) -> float:
        self.deadline_s = self.received_s + envelope.remaining_s
        self.content_type = envelope.content_type
        return self.received_s

    def admit(self, request: InferRequest, envelope: Envelope) -> Call:
        self.request = request
        self.deadline_s = self.received_s + within_timeout(envelope.remaining_s, request)
        return Call(Deadline(self.deadline_s), envelope.traceparent, envelope.tracestate)

    def settle(self, future: "asyncio.Future[Answer]") -> None:
        self._front.settle(self, future)

    def span_attributes(self) -> Mapping[str, Attribute]:
        return {
            "messaging.system": "mqtt",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": self.publication.topic.decode(errors="replace"),
            "messaging.destination.template": template_of(self.publication.topic),
            "messaging.client.id": self.address.client,
            "messaging.message.body.size": len(self.publication.payload),
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
