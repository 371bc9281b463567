"""MQTT 5 by hand over one blocking socket: it takes so little of a core that what is measured is the other end."""

import socket
import struct

from edge_agent.front.mqtt.publication import with_length

CONNACK, PUBLISH, PUBACK, SUBACK = 0x20, 0x30, 0x40, 0x90
QOS_BITS = 0x06
TIMEOUT_S = 10.0


class RawClient:
    """Connected and subscribed to one filter when it is made; packets are whole, their header byte apart."""

    def __init__(self, port: int, *, client_id: str, topic_filter: str, qos: int, timeout_s: float = TIMEOUT_S) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self.send(b"\x10" + with_length(b"\x00\x04MQTT\x05\x02\x00\x3c\x00" + sized(client_id.encode())))
        self._await(CONNACK)
        self.send(b"\x82" + with_length(b"\x00\x01\x00" + sized(topic_filter.encode()) + bytes([qos])))
        self._await(SUBACK)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, packets: bytes) -> None:
        self._socket.sendall(packets)

    def packets(self) -> list[tuple[int, bytes]]:
        """Return the whole packets that one read brings, as header byte and what follows the remaining length."""
        chunk = self._socket.recv(1 << 18)
        if not chunk:
            raise ConnectionError("the broker closed the connection")
        buffer = self._received + chunk
        packets = []
        at = 0
        while True:
            size, body = remaining_length(buffer, at + 1)
            if size < 0 or body + size > len(buffer):
                break
            packets.append((buffer[at], buffer[body : body + size]))
            at = body + size
        self._received = buffer[at:]
        return packets

    def _await(self, kind: int) -> None:
        while not any(header & 0xF0 == kind for header, _ in self.packets()):
            pass


def acknowledgement(packet_id: int) -> bytes:
    return struct.pack("!BBH", PUBACK, 2, packet_id)


def sized(value: bytes) -> bytes:
    return struct.pack("!H", len(value)) + value


def remaining_length(buffer: bytes, at: int) -> tuple[int, int]:
    """Return the length of a packet and where its body starts; -1 while it is not all there."""
    value = shift = 0
    while at < len(buffer):
        digit = buffer[at]
        at += 1
        value |= (digit & 0x7F) << shift
        if not digit & 0x80:
            return value, at
        shift += 7
    return -1, at
