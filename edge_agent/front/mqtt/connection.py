"""One connection to the broker, from dialling to its end; it is never used again.

paho speaks the protocol, the agent's own loop moves the bytes: no thread, and no second queue on top of paho's (half of
the throughput is lost otherwise, measured). Three of paho's methods are replaced:

- `_create_socket`: the TCP connection is dialled by the loop, which must not block, and handed over.
- the socket itself: `BufferedSocket` reads and writes in large pieces where paho asks for single bytes and packets.
- `_handle_publish`: PUBLISH is decoded by `publication`, for the reasons given there.

DIALLING → HANDSHAKE (CONNECT, SUBSCRIBE) → ONLINE → CLOSED
"""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from core.errors import InvalidRequest, Unavailable
from edge_agent.front.mqtt.publication import Publication, decode_publication

# Chosen: a few round trips over a slow link; the kernel's own limit on a silent host is two minutes.
OPEN_TIMEOUT_S = 10.0
# How long the broker keeps the requests of an absent agent; each also has its own expiry.
SESSION_EXPIRY_S = 3600
# Chosen: one read takes what a busy broker has sent since the last turn of the loop.
_READ_BYTES = 256 << 10
# Written bytes that the kernel has not taken; beyond it paho keeps its packets.
_MAX_UNSENT_BYTES = 4 << 20
_HOUSEKEEPING_S = 1.0
# Linux only.
_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)


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


class BufferedSocket:
    """A non-blocking socket that reads ahead and gathers writes until `flush`; what paho calls a SocketLike."""

    def __init__(self, raw: socket.socket) -> None:
        self._raw = raw
        self._read = b""
        self._at = 0
        self._unsent = bytearray()
        self._owes_ack = False

    @property
    def has_read_ahead(self) -> bool:
        return self._at < len(self._read)

    def recv(self, size: int) -> bytes:
        if self._at >= len(self._read):
            self._read = self._raw.recv(_READ_BYTES)
            self._at = 0
            self._owes_ack = True
        start = self._at
        self._at = min(start + size, len(self._read))
        return self._read[start : self._at]

    def send(self, piece: bytes | bytearray) -> int:
        if len(self._unsent) > _MAX_UNSENT_BYTES:
            raise BlockingIOError(errno.EAGAIN, "the broker does not read")
        self._unsent += piece
        return len(piece)

    def flush(self) -> bool:
        """Hand on what was written; False when the kernel did not take all of it."""
        while self._unsent:
            try:
                sent = self._raw.send(self._unsent)
            except BlockingIOError:
                return False
            del self._unsent[:sent]
            # Whatever is sent acknowledges along what was read.
            self._owes_ack = False
        return True

    def acknowledge(self) -> None:
        """Have the kernel acknowledge what was read, unless something was sent since.

        A broker that leaves Nagle on (mosquitto by default) keeps the next request back until then, which takes 40 ms
        when the kernel waits for something to send along (measured).
        """
        if self._owes_ack and _QUICK_ACK is not None:
            self._owes_ack = False
            # Not sticky: it is for this once.
            self._raw.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)

    def fileno(self) -> int:
        return self._raw.fileno()

    def setblocking(self, flag: bool) -> None:
        self._raw.setblocking(flag)

    def close(self) -> None:
        try:
            self.flush()
        except OSError:
            # The peer is gone already; there is nobody left to tell.
            pass
        finally:
            self._raw.close()


class _PackedProperties(Properties):
    """Properties that are encoded already."""

    def __init__(self, packed: bytes) -> None:
        object.__setattr__(self, "packetType", PacketTypes.PUBLISH)
        object.__setattr__(self, "_packed", packed)

    def pack(self) -> bytes:
        packed: bytes = object.__getattribute__(self, "_packed")
        return packed


class _LoopClient(Client):
    """paho on a socket that is connected already, with our decoder for PUBLISH."""

    def __init__(
        self, connected: BufferedSocket, settings: ConnectionSettings, receive: Callable[[Publication], None]
    ) -> None:
        version = MQTTProtocolVersion.MQTTv5 if settings.is_v5 else MQTTProtocolVersion.MQTTv311
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            clean_session=None if settings.is_v5 else True,
            protocol=version,
            reconnect_on_failure=False,
        )
        self._connected = connected
        self._has_properties = settings.is_v5
        self._receive = receive

    def limit_in_flight(self, receive_maximum: int) -> None:
        """Send as many QoS 1 messages ahead as the broker takes (MQTT 5.0, section 3.2.2.3.3).

        paho keeps to a number of its own, and its setter refuses to work on a connection, which is when we know.
        """
        self._max_inflight_messages = receive_maximum

    def _create_socket(self) -> Any:
        return self._connected

    def _handle_publish(self) -> MQTTErrorCode:
        packet = self._in_packet
        try:
            publication = decode_publication(
                packet["command"], bytes(packet["packet"]), has_properties=self._has_properties
            )
        except InvalidRequest:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        self._receive(publication)
        # QoS 2 does not come: the subscriptions ask for 1 at most.
        return self._send_puback(publication.packet_id) if publication.qos else MQTTErrorCode.MQTT_ERR_SUCCESS


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
        self._settings = settings
        self._will = will
        self._receive = receive
        self._acknowledged = acknowledged
        self._loop = asyncio.get_running_loop()
        self._subscribed: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._socket: BufferedSocket | None = None
        self._client: _LoopClient | None = None
        self._housekeeping: asyncio.TimerHandle | None = None
        self._awaits_writable = False

    async def open(self) -> None:
        """Connect and subscribe.

        Raises:
            Unavailable: the broker cannot be reached, refuses, or takes too long.
        """
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                self._socket = BufferedSocket(await self._dial())
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
        packed = None if properties is None else _PackedProperties(properties)
        return self._client.publish(topic, payload, qos, retain, packed).mid

    async def close(self) -> None:
        """Say goodbye, so that the broker drops the Will, and end the connection."""
        reason = "closed"
        if self._client is not None and self.state is ConnectionState.ONLINE:
            self._client.disconnect()
            try:
                async with asyncio.timeout(OPEN_TIMEOUT_S):
                    await self.ended()
            except TimeoutError:
                reason = "the broker did not take the goodbye"
        self.abort(reason)

    def abort(self, reason: str) -> None:
        """End the connection without a goodbye; harmless when it is over."""
        if self._socket is not None and self.state is not ConnectionState.CLOSED:
            self._stop_watching()
            self._socket.close()
        self._finish(reason)

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

    def _make_client(self, connected: BufferedSocket) -> _LoopClient:
        settings = self._settings
        client = _LoopClient(connected, settings, self._receive)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
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
        assert isinstance(client, _LoopClient)
        client.limit_in_flight(getattr(properties, "ReceiveMaximum", 65535))
        client.subscribe(list(self._settings.filters))

    def _on_subscribe(
        self, _client: Client, _user: Any, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        pairs = zip(self._settings.filters, reasons, strict=False)
        refused = [topic for (topic, _), reason in pairs if reason.is_failure]
        if refused:
            self._fail(f"the broker refused the subscription to {refused[0]}")
        elif not self._subscribed.done():
            self._subscribed.set_result(None)

    def _on_publish(
        self, _client: Client, _user: Any, mid: int, _reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._acknowledged(mid)

    def _on_disconnect(
        self, _client: Client, _user: Any, _flags: DisconnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._finish(str(reason))

    def _on_socket_open(self, _client: Client, _user: Any, connected: Any) -> None:
        self._loop.add_reader(connected.fileno(), self._on_readable)
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
        try:
            self._client.loop_read()
            while self._socket.has_read_ahead and not self._ended.done():
                self._client.loop_read()
        except Exception as error:
            _log.error("the MQTT client failed by a defect", exc_info=True)
            self.abort(f"internal error: {type(error).__name__}")
            return
        self._loop.call_soon(self._loop.call_soon, self._acknowledge)

    def _acknowledge(self) -> None:
        if self._socket is not None and not self._ended.done():
            self._socket.acknowledge()

    def _on_want_write(self, _client: Client, _user: Any, _connected: Any) -> None:
        # Two turns later: then the acknowledgement of a request and the reply of a quick model leave in one piece.
        self._loop.call_soon(self._loop.call_soon, self._write)

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
        if is_sent and self._client.want_write():
            self._loop.call_soon(self._write)

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
