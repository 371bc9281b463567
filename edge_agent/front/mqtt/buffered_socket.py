"""A socket between paho and the kernel: paho reads single bytes and writes single packets, this moves large pieces."""

import errno
import socket
from collections.abc import Container
from typing import Protocol

# Chosen: one read takes what a busy broker has sent since the last turn of the loop.
_READ_BYTES = 256 << 10
# Written bytes that the kernel has not taken; beyond it paho keeps its packets.
_MAX_UNSENT_BYTES = 4 << 20
# Linux only.
_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)


class RawSocket(Protocol):
    """What is used of a connected, non-blocking socket; both raise BlockingIOError when they would wait."""

    def recv(self, size: int, /) -> bytes: ...

    def send(self, piece: bytearray, /) -> int: ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...

    def fileno(self) -> int: ...

    def setblocking(self, flag: bool, /) -> None: ...

    def close(self) -> None: ...


class BufferedSocket:
    """A non-blocking socket that reads ahead and gathers writes until `flush`; what paho calls a SocketLike."""

    def __init__(self, raw: RawSocket) -> None:
        self._raw = raw
        self._read = b""
        self._at = 0
        self._unsent = bytearray()
        self._owes_ack = False

    @property
    def has_read_ahead(self) -> bool:
        return self._at < len(self._read)

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    def recv(self, size: int) -> bytes:
        if self._at >= len(self._read):
            self._fill()
        start = self._at
        self._at = min(start + size, len(self._read))
        return self._read[start : self._at]

    def take_packet(self, kind: int, ids: Container[int] | None = None) -> tuple[int, bytes] | None:
        """Take the next packet if it is of `kind` and all of it was read: its first byte, and what follows the length.

        None: it is another's to read, byte by byte. Source: MQTT 5.0, sections 1.5.5 and 2.1.

        Args:
            ids: of which the packet identifier that it begins with has to be one.
        """
        if self._at >= len(self._read):
            try:
                self._fill()
            except OSError:
                # There is nothing, or the connection is over: whoever reads next hears of it.
                return None
        data, at = self._read, self._at
        if at >= len(data) or data[at] & 0xF0 != kind:
            return None
        size = shift = 0
        for start in range(at + 1, min(at + 5, len(data))):
            digit = data[start]
            size |= (digit & 0x7F) << shift
            shift += 7
            if digit < 0x80:
                end = start + 1 + size
                if end > len(data):
                    return None
                packet = data[start + 1 : end]
                if ids is not None and (size < 2 or int.from_bytes(packet[:2]) not in ids):
                    return None
                self._at = end
                return data[at], packet
        return None

    def _fill(self) -> None:
        self._read = self._raw.recv(_READ_BYTES)
        self._at = 0
        self._owes_ack = True

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
