"""paho's client as this agent uses it: the protocol is paho's, the connection and the hot path are ours.

Some of paho's parts are replaced, each in as few lines as it takes:

- `_create_socket`: the TCP connection is dialled by the loop, which must not block, and handed over.
- `_handle_publish`: PUBLISH is decoded by `publication`, for the reasons given there.
- `_do_on_publish`: told of QoS 1 alone; paho's callback comes for QoS 0 too, with objects that cost 10 us each time.
- `_max_inflight_messages`: paho keeps to a number of its own instead of the broker's.
- `read`, `publish_at_once` and `_send_puback` go past it with what is whole and plain: requests, replies, and the
  acknowledgements of both. Its dictionaries, locks and objects for each packet cost 14 us a request at QoS 0 and 38 at
  QoS 1 (measured). Both count towards what the broker takes ahead, and packet ids are unique among both.

They are not public, so the pinned version matters; the tests against a real broker cover each of them.
"""

import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from core.errors import InvalidRequest
from edge_agent.front.mqtt.buffered_socket import BufferedSocket
from edge_agent.front.mqtt.publication import Publication, decode_publication, with_length

# MQTT 5.0, section 2.1.2: the kind of a packet is the upper half of its first byte.
_PUBLISH = 0x30
_PUBACK = 0x40
# With this length there is room for the packet identifier alone, which says that all went well (section 3.4.2.1).
_ACKNOWLEDGED = b"\x40\x02"
_MAX_TOPIC_BYTES = 65535
_pack_uint16 = struct.Struct("!H").pack


class PackedProperties(Properties):
    """Properties that are encoded already."""

    def __init__(self, packed: bytes) -> None:
        object.__setattr__(self, "packetType", PacketTypes.PUBLISH)
        object.__setattr__(self, "_packed", packed)

    def pack(self) -> bytes:
        packed: bytes = object.__getattribute__(self, "_packed")
        return packed


class LoopClient(Client):
    """paho on a socket that is connected already, with our decoder for PUBLISH."""

    def __init__(
        self,
        connected: BufferedSocket,
        *,
        client_id: str,
        is_v5: bool,
        receive: Callable[[Publication], None],
        acknowledged: Callable[[int], None],
    ) -> None:
        version = MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if is_v5 else True,
            protocol=version,
            reconnect_on_failure=False,
        )
        self._connected = connected
        self._has_properties = is_v5
        self._receive = receive
        self._acknowledged = acknowledged
        # Of what goes past paho at QoS 1: packet ids, and packets for which the broker has no place yet.
        self._unacknowledged: set[int] = set()
        self._waiting: deque[tuple[int, bytes]] = deque()

    def read(self) -> None:
        """Take one packet, or what there is of it."""
        if self._in_packet["command"] == 0:
            packet = self._connected.take_packet(_PUBLISH)
            if packet is not None:
                # By which paho knows that the broker is alive.
                self._last_bytes_received = time.monotonic()
                result = self._take(*packet)
                if result is not MQTTErrorCode.MQTT_ERR_SUCCESS:
                    self._loop_rc_handle(result)
                return
            packet = self._connected.take_packet(_PUBACK, self._unacknowledged) if self._unacknowledged else None
            if packet is not None:
                self._last_bytes_received = time.monotonic()
                self._note_acknowledged(int.from_bytes(packet[1][:2]))
                return
        result = self._packet_read()
        if result > 0:
            self._loop_rc_handle(result)

    def publish_at_once(self, topic: str, payload: bytes, properties: bytes | None, *, qos: int) -> int | None:
        """Send a message as soon as the broker takes it and return its packet id, 0 at QoS 0; None: it is paho's to do.

        Args:
            properties: encoded, with their length.
        """
        encoded = topic.encode()
        if b"+" in encoded or b"#" in encoded or not encoded or len(encoded) > _MAX_TOPIC_BYTES or self._sock is None:
            return None
        packet_id = self._mid_generate() if qos else 0
        if self._has_properties and properties is None:
            properties = b"\x00"
        identifier = _pack_uint16(packet_id) if qos else b""
        content = _pack_uint16(len(encoded)) + encoded + identifier + (properties or b"") + payload
        packet = bytes((_PUBLISH | qos << 1,)) + with_length(content)
        if not qos:
            return 0 if self._send_at_once(packet) else None
        self._unacknowledged.add(packet_id)
        self._waiting.append((packet_id, packet))
        self._send_waiting()
        return packet_id

    def _send_waiting(self) -> None:
        while self._waiting and self._inflight_messages < self._max_inflight_messages:
            packet_id, packet = self._waiting.popleft()
            self._inflight_messages += 1
            if not self._send_at_once(packet):
                self._packet_queue(_PUBLISH, packet, packet_id, 1)

    def _note_acknowledged(self, packet_id: int) -> None:
        self._unacknowledged.discard(packet_id)
        self._inflight_messages -= 1
        if self._out_messages:
            self._update_inflight()
        self._send_waiting()
        self._acknowledged(packet_id)

    def _handle_pubackcomp(self, cmd: Literal["PUBACK", "PUBCOMP"]) -> MQTTErrorCode:
        packet_id = int.from_bytes(self._in_packet["packet"][:2])
        if packet_id not in self._unacknowledged:
            return super()._handle_pubackcomp(cmd)
        self._note_acknowledged(packet_id)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _mid_generate(self) -> int:
        while True:
            packet_id = super()._mid_generate()
            if packet_id not in self._unacknowledged and packet_id not in self._out_messages:
                return packet_id

    def limit_in_flight(self, receive_maximum: int) -> None:
        """Send as many QoS 1 messages ahead as the broker takes (MQTT 5.0, section 3.2.2.3.3).

        paho keeps to a number of its own, and its setter refuses to work on a connection, which is when we know.
        """
        self._max_inflight_messages = receive_maximum

    def _create_socket(self) -> Any:
        return self._connected

    def _handle_publish(self) -> MQTTErrorCode:
        packet = self._in_packet
        return self._take(packet["command"], bytes(packet["packet"]))

    def _take(self, header: int, packet: bytes) -> MQTTErrorCode:
        try:
            publication = decode_publication(header, packet, has_properties=self._has_properties)
        except InvalidRequest:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        self._receive(publication)
        # QoS 2 does not come: the subscriptions ask for 1 at most.
        return self._send_puback(publication.packet_id) if publication.qos else MQTTErrorCode.MQTT_ERR_SUCCESS

    def _send_puback(self, mid: int) -> MQTTErrorCode:
        if self._send_at_once(_ACKNOWLEDGED + _pack_uint16(mid)):
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        return super()._send_puback(mid)

    def _send_at_once(self, packet: bytes) -> bool:
        if self._sock is None or self._out_packet:
            return False
        try:
            self._connected.send(packet)
        except BlockingIOError:
            return False
        self._last_msg_out = time.monotonic()
        self._call_socket_register_write()
        return True

    def _do_on_publish(self, mid: int, reason_code: ReasonCode, properties: Properties) -> MQTTErrorCode:
        self._acknowledged(mid)
        result = super()._do_on_publish(mid, reason_code, properties)
        self._send_waiting()
        return result
