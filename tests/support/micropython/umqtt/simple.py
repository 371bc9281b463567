"""As much of `umqtt.simple` (micropython-lib) as examples/micropython needs, with its interface, for MicroPython.

Boards get the original by `mip`; a test has no network to fetch it from. MQTT 3.1.1, QoS 0, packets below 16 kB.
"""

import select
import socket
import struct


class MQTTException(Exception):
    pass


class MQTTClient:
    def __init__(self, client_id, server, port=1883, keepalive=0):
        self._client_id = client_id.encode()
        self._address = socket.getaddrinfo(server, port)[0][-1]
        self._keepalive = keepalive
        self._packet_id = 0
        self._callback = None

    def set_callback(self, callback):
        self._callback = callback

    def connect(self):
        self._socket = socket.socket()
        self._socket.connect(self._address)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        head = b"\x00\x04MQTT\x04\x02" + struct.pack("!H", self._keepalive)
        self._send(0x10, head + _text(self._client_id))
        kind, body = self._receive()
        if kind != 0x20 or body[1] != 0:
            raise MQTTException(body)

    def disconnect(self):
        self._send(0xE0, b"")
        self._socket.close()

    def subscribe(self, topic):
        self._packet_id += 1
        self._send(0x82, struct.pack("!H", self._packet_id) + _text(topic.encode()) + b"\x00")
        while self._handle() != 0x90:
            pass

    def publish(self, topic, payload):
        self._send(0x30, _text(topic.encode()) + payload.encode())

    def check_msg(self):
        if self._poll.poll(0):
            self._handle()

    def _handle(self):
        kind, body = self._receive()
        if kind & 0xF0 == 0x30:
            end = 2 + struct.unpack("!H", body[:2])[0]
            self._callback(body[2:end], body[end:])
        return kind

    def _send(self, kind, body):
        size, length = len(body), b""
        while True:
            size, low = size >> 7, size & 0x7F
            length += bytes([low | (0x80 if size else 0)])
            if not size:
                break
        self._socket.write(bytes([kind]) + length + body)

    def _receive(self):
        kind = self._exactly(1)[0]
        size, shift = 0, 0
        while True:
            byte = self._exactly(1)[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return kind, self._exactly(size)

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            more = self._socket.read(size - len(data))
            if not more:
                raise OSError(-1)
            data += more
        return data


def _text(data):
    return struct.pack("!H", len(data)) + data
