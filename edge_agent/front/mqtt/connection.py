"""One connection to the broker, from dialling to its end; it is never used again.

paho speaks the protocol (`loop_client`), the agent's own loop moves the bytes: no thread, and no second queue on top of
paho's (half of the throughput is lost otherwise, measured).

DIALLING → HANDSHAKE (CONNECT, SUBSCRIBE) → ONLINE → CLOSED
"""

import asyncio
import errno
import logging
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from core.errors import Unavailable
from core.logs import withheld
from edge_agent.front.mqtt.buffered_socket import BufferedSocket
from edge_agent.front.mqtt.loop_client import LoopClient, PackedProperties
from edge_agent.front.mqtt.publication import Publication
from edge_agent.front.mqtt.tls import BrokerTls
from edge_agent.front.mqtt.tls_socket import TlsSocket, shake_hands

# Chosen: a few round trips over a slow link; the kernel's own limit on a silent host is two minutes.
OPEN_TIMEOUT_S = 10.0
# Chosen: a few round trips for what is queued ahead of the goodbye; the Will says the same when it is over.
FAREWELL_TIMEOUT_S = 5.0
# How long the broker keeps the requests of an absent agent; each also has its own expiry.
SESSION_EXPIRY_S = 3600
_HOUSEKEEPING_S = 1.0
# Replies that the broker does not take; beyond it no more requests are read. Chosen: a burst of some thousand.
_MAX_UNSENT_BYTES = 1 << 20
# A turn of the loop costs about as much as a request, so what comes while no more than these are taken shares it, up to
# so many reads. Measured: with more of either, devices that wait for their answers are slowed down.
_FEW_PACKETS = 2
_MAX_READS = 3
# The largest remaining length with its header (MQTT 5.0, section 2.1.4).
UNLIMITED_PACKET_BYTES = 268_435_460


_log = logging.getLogger(__name__)


class ConnectionState(Enum):
    DIALLING = "dialling"
    HANDSHAKE = "handshake"
    ONLINE = "online"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, when this connection ends without a goodbye."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    host: str
    port: int
    client_id: str
    is_v5: bool
    keepalive_s: int
    # Topic filters, each with the QoS to subscribe at.
    filters: Sequence[tuple[str, int]]
    # QoS 1 messages that the broker may send ahead of their acknowledgement.
    receive_maximum: int
    # The broker drops what is larger; bounds what one message can make this process hold.
    max_packet_bytes: int
    # None: in the clear, on loopback.
    tls: BrokerTls | None = None


class BrokerConnection:
    """`receive` is called in the loop for every request, `acknowledged` for every QoS 1 publish that arrived."""

    def __init__(
        self,
        settings: ConnectionSettings,
        will: Will,
        *,
        receive: Callable[[Publication], None],
        acknowledged: Callable[[int], None],
    ) -> None:
        self.state = ConnectionState.DIALLING
        # What the broker takes; it says so when it accepts the connection.
        self.max_packet_bytes = UNLIMITED_PACKET_BYTES
        self._settings = settings
        self._will = will
        self._receive = receive
        self._acknowledged = acknowledged
        self._loop = asyncio.get_running_loop()
        self._subscribed: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._farewell: asyncio.Future[None] = self._loop.create_future()
        self._farewell_id: int | None = None
        self._socket: BufferedSocket | None = None
        self._tls: TlsSocket | None = None
        self._client: LoopClient | None = None
        self._housekeeping: asyncio.TimerHandle | None = None
        # Asked whether more has come, within a turn of the loop.
        self._arrivals = select.poll()
        self._is_reading = False
        # From a read until the replies to it could leave, which what comes meanwhile shall not delay.
        self._is_answering = False
        self._awaits_writable = False
        self._is_paused = False

    async def open(self) -> None:
        """Connect and subscribe.

        Raises:
            Unavailable: the broker cannot be reached, refuses, or takes too long.
        """
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                self._socket = BufferedSocket(await self._reach())
                self.state = ConnectionState.HANDSHAKE
                self._client = self._make_client(self._socket)
                self._client.reconnect()
                await self._subscribed
        except TimeoutError as error:
            raise Unavailable(f"no answer within {OPEN_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise Unavailable(error.strerror or str(error)) from error
        self.state = ConnectionState.ONLINE

    async def ended(self) -> str:
        """Wait until the connection is over and return why."""
        return await asyncio.shield(self._ended)

    def publish(
        self, topic: str, payload: bytes, *, qos: int, properties: bytes | None = None, retain: bool = False
    ) -> int:
        """Send a message and return its packet id; `acknowledged` is called with it for QoS 1."""
        assert self._client is not None
        if not retain:
            packet_id = self._client.publish_at_once(topic, payload, properties, qos=qos)
            if packet_id is not None:
                return packet_id
        packed = None if properties is None else PackedProperties(properties)
        return self._client.publish(topic, payload, qos, retain, packed).mid

    async def close(self, farewell: bytes) -> None:
        """Publish `farewell` in the place of the Will and end the connection.

        Only a broker that has taken it is said goodbye to: that makes it drop the Will, which else says the same.
        """
        reason = "the broker did not take the farewell"
        if self._client is not None and self.state is ConnectionState.ONLINE:
            self._farewell_id = self.publish(self._will.topic, farewell, qos=1, retain=True)
            either: list[asyncio.Future[Any]] = [self._farewell, self._ended]
            await asyncio.wait(either, timeout=FAREWELL_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if self._farewell.done() and not self._ended.done():
                self._client.disconnect()
                await asyncio.wait([self._ended], timeout=FAREWELL_TIMEOUT_S)
                reason = "closed"
        self.abort(reason)

    def abort(self, reason: str) -> None:
        """End the connection without a goodbye; harmless when it is over."""
        if self._socket is not None and self.state is not ConnectionState.CLOSED:
            self._stop_watching()
            self._socket.close()
        self._finish(reason)

    async def _reach(self) -> socket.socket | TlsSocket:
        """Dial, and where it is asked for let both ends prove who they are."""
        tls = self._settings.tls
        if tls is None:
            return await self._dial()
        # First: without a readable identity nobody need be troubled.
        context = await tls.context()
        self._tls = await shake_hands(await self._dial(), context, server_name=tls.server_name)
        return self._tls

    async def _dial(self) -> socket.socket:
        host, port = self._settings.host, self._settings.port
        failure: OSError = OSError(errno.EHOSTUNREACH, f"{host} has no address")
        for family, kind, protocol, _, address in await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            candidate = socket.socket(family, kind, protocol)
            try:
                candidate.setblocking(False)
                # Without it a QoS 1 round trip takes 40 ms instead of 0.6 ms (measured).
                candidate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._loop.sock_connect(candidate, address)
            except OSError as error:
                failure = error
                candidate.close()
            except BaseException:
                candidate.close()
                raise
            else:
                return candidate
        raise failure

    def _make_client(self, connected: BufferedSocket) -> LoopClient:
        settings = self._settings
        client = LoopClient(
            connected,
            client_id=settings.client_id,
            is_v5=settings.is_v5,
            receive=self._receive,
            acknowledged=self._on_acknowledged,
        )
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_want_write
        client.max_queued_messages_set(0)
        client.will_set(self._will.topic, self._will.payload, qos=1, retain=True)
        if settings.is_v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            properties.ReceiveMaximum = settings.receive_maximum
            properties.MaximumPacketSize = settings.max_packet_bytes
            client.connect_async(
                settings.host, settings.port, settings.keepalive_s, clean_start=False, properties=properties
            )
        else:
            client.connect_async(settings.host, settings.port, settings.keepalive_s)
        return client

    def _on_connect(
        self, client: Client, _user: Any, _flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._fail(f"the broker refused the connection: {reason}")
            return
        assert isinstance(client, LoopClient)
        client.limit_in_flight(getattr(properties, "ReceiveMaximum", 65535))
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", UNLIMITED_PACKET_BYTES)
        client.subscribe(list(self._settings.filters))

    def _on_acknowledged(self, packet_id: int) -> None:
        if packet_id == self._farewell_id and not self._farewell.done():
            self._farewell.set_result(None)
        self._acknowledged(packet_id)

    def _on_subscribe(
        self, _client: Client, _user: Any, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        pairs = zip(self._settings.filters, reasons, strict=False)
        refused = [topic for (topic, _), reason in pairs if reason.is_failure]
        if refused:
            self._fail(f"the broker refused the subscription to {refused[0]}")
        elif not self._subscribed.done():
            self._subscribed.set_result(None)

    def _on_disconnect(
        self, _client: Client, _user: Any, _flags: DisconnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        # With TLS 1.3 a broker refuses our certificate after the handshake is over on this side.
        fault = None if self._tls is None else self._tls.fault
        self._finish(str(reason) if fault is None else f"TLS: {fault}")

    def _on_socket_open(self, _client: Client, _user: Any, connected: Any) -> None:
        self._loop.add_reader(connected.fileno(), self._on_readable)
        self._arrivals.register(connected.fileno(), select.POLLIN)
        self._housekeeping = self._loop.call_later(_HOUSEKEEPING_S, self._keep_house)

    def _on_socket_close(self, _client: Client, _user: Any, _connected: Any) -> None:
        self._stop_watching()

    def _stop_watching(self) -> None:
        assert self._socket is not None
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())

    def _on_readable(self) -> None:
        assert self._client is not None
        assert self._socket is not None
        if self._is_answering:
            return
        self._is_reading = True
        try:
            reads = 1
            while self._take_packets() <= _FEW_PACKETS and reads < _MAX_READS and self._has_more():
                reads += 1
        except Exception as error:
            _log.error("the MQTT client failed by a defect", exc_info=withheld(error))
            self.abort(f"internal error: {type(error).__name__}")
            return
        finally:
            self._is_reading = False
        self._is_answering = True
        self._loop.call_soon(self._loop.call_soon, self._loop.call_soon, self._acknowledge)

    def _take_packets(self) -> int:
        """Take what one read brings, and return how many packets that were."""
        assert self._client is not None
        assert self._socket is not None
        self._client.read()
        taken = 1
        while self._socket.has_read_ahead and not self._ended.done():
            self._client.read()
            taken += 1
        return taken

    def _has_more(self) -> bool:
        # Not by reading: that has the kernel acknowledge what came, where the reply would have done so.
        return not self._ended.done() and bool(self._arrivals.poll(0))

    def _acknowledge(self) -> None:
        self._is_answering = False
        if self._socket is not None and not self._ended.done():
            self._socket.acknowledge()

    def _on_want_write(self, _client: Client, _user: Any, _connected: Any) -> None:
        # In the next turn of the loop, so that all replies of this one leave in one piece; while reading, one turn
        # later still, so that the acknowledgement of a request leaves together with the reply of a quick model.
        if self._is_reading:
            self._loop.call_soon(self._loop.call_soon, self._write)
        else:
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        if self._ended.done():
            return
        assert self._client is not None
        assert self._socket is not None
        self._client.loop_write()
        try:
            is_sent = self._socket.flush()
        except OSError as error:
            self.abort(error.strerror or str(error))
            return
        if is_sent == self._awaits_writable:
            self._awaits_writable = not is_sent
            if is_sent:
                self._loop.remove_writer(self._socket.fileno())
            else:
                self._loop.add_writer(self._socket.fileno(), self._write)
        self._pause_or_resume(is_sent)
        if is_sent and self._client.want_write():
            self._loop.call_soon(self._write)

    def _pause_or_resume(self, is_sent: bool) -> None:
        """Read nothing while the broker does not take what was said to it; its keepalive ends what lasts."""
        assert self._socket is not None
        if self._is_paused:
            if is_sent:
                self._is_paused = False
                self._loop.add_reader(self._socket.fileno(), self._on_readable)
        elif self._socket.unsent_bytes > _MAX_UNSENT_BYTES:
            self._is_paused = True
            self._loop.remove_reader(self._socket.fileno())

    def _keep_house(self) -> None:
        assert self._client is not None
        self._housekeeping = self._loop.call_later(_HOUSEKEEPING_S, self._keep_house)
        self._client.loop_misc()

    def _fail(self, reason: str) -> None:
        if not self._subscribed.done():
            self._subscribed.set_exception(Unavailable(reason))
            # Seen, also when `open` has been left already.
            self._subscribed.exception()

    def _finish(self, reason: str) -> None:
        self.state = ConnectionState.CLOSED
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        self._fail(f"the connection ended during the handshake: {reason}")
        if not self._ended.done():
            self._ended.set_result(reason)
