"""Whole packets from a socket that gives what it likes: nothing is lost or read twice, and the rest is paho's."""

import errno
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.front.mqtt.buffered_socket import BufferedSocket
from edge_agent.front.mqtt.publication import with_length

PUBLISH = 0x30


class Pieces:
    """A raw socket that gives one piece per read."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = list(pieces)

    def recv(self, _size: int) -> bytes:
        if not self._pieces:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        return self._pieces.pop(0)

    def send(self, piece: bytearray) -> int:
        return len(piece)

    def setsockopt(self, _level: int, _option: int, _value: int) -> None: ...
    def fileno(self) -> int:
        return -1

    def setblocking(self, _flag: bool) -> None: ...
    def close(self) -> None: ...


def read_exactly(connected: BufferedSocket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += connected.recv(size - len(found))
    return found


def read_as_paho_does(connected: BufferedSocket) -> tuple[int, bytes]:
    [header] = read_exactly(connected, 1)
    size = shift = 0
    while True:
        [digit] = read_exactly(connected, 1)
        size |= (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return header, read_exactly(connected, size)


packets = st.tuples(st.sampled_from([0x30, 0x32, 0x3B, 0x40, 0x90, 0xD0]), st.binary(max_size=300))


@given(st.lists(packets, max_size=8), st.lists(st.integers(1, 400)))
def test_every_packet_is_read_once_and_in_order_however_the_bytes_come(
    sent: Sequence[tuple[int, bytes]], cuts: Sequence[int]
) -> None:
    stream = b"".join(bytes([header]) + with_length(body) for header, body in sent)
    pieces, at = [], 0
    for cut in cuts:
        pieces += [stream[at : at + cut]] if at < len(stream) else []
        at += cut
    pieces += [stream[at:]] if at < len(stream) else []
    connected = BufferedSocket(Pieces(pieces))
    found = [connected.take_packet(PUBLISH) or read_as_paho_does(connected) for _ in sent]
    assert found == list(sent)
    assert connected.take_packet(PUBLISH) is None


def test_a_packet_that_was_read_as_a_whole_is_taken_at_once() -> None:
    connected = BufferedSocket(Pieces([b"\x30" + with_length(b"x" * 200)]))
    assert connected.take_packet(PUBLISH) == (0x30, b"x" * 200)


@pytest.mark.parametrize(
    "piece", [b"", b"\x30", b"\x30\x80", b"\x30\xff\xff\xff\xff\x01", b"\x30\x05abc", b"\x40\x02\x00\x01"]
)
def test_what_is_not_whole_or_not_of_that_kind_is_left_as_it_is(piece: bytes) -> None:
    connected = BufferedSocket(Pieces([piece, b""]))
    assert connected.take_packet(PUBLISH) is None
    assert connected.recv(100) == piece
