"""What goes past paho keeps to the protocol with what goes through it: one sequence, one count of what is ahead."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.front.mqtt.buffered_socket import BufferedSocket
from edge_agent.front.mqtt.loop_client import LoopClient
from edge_agent.front.mqtt.publication import Publication, with_length
from tests.unit.agent.test_buffered_socket import Pieces, read_as_paho_does

TOPIC = "nf/v1/s/clients/c/replies"
RECEIVE_MAXIMUM = 3
CONNACK = b"\x20" + with_length(b"\x00\x00\x03\x21" + struct.pack("!H", RECEIVE_MAXIMUM))
PUBLISH, PUBACK = 0x30, 0x40


class Raw(Pieces):
    """A socket to a broker that says what a test tells it, and keeps what it hears."""

    def __init__(self) -> None:
        super().__init__([])
        self.sent = b""

    def say(self, *pieces: bytes) -> None:
        self._pieces += pieces

    def send(self, piece: bytearray) -> int:
        self.sent += piece
        return len(piece)


class Side:
    """A client that is connected, and the broker's end of it."""

    def __init__(self) -> None:
        self.raw = Raw()
        self.socket = BufferedSocket(self.raw)
        self.received: list[Publication] = []
        self.acknowledged: list[int] = []
        self.client = LoopClient(
            self.socket, client_id="a", is_v5=True, receive=self.received.append, acknowledged=self.acknowledged.append
        )
        self.client.on_socket_register_write = lambda *_: None
        self.client.on_connect = lambda client, *_: client.limit_in_flight(RECEIVE_MAXIMUM)
        self.client._host, self.client._port = "broker", 1883
        self.client.reconnect()
        self.hears(CONNACK)
        self.heard()

    def hears(self, *pieces: bytes) -> None:
        self.raw.say(*pieces)
        for _ in pieces:
            self.client.read()
            while self.socket.has_read_ahead:
                self.client.read()

    def heard(self) -> list[tuple[int, bytes]]:
        """Return what has come to the broker since the last time."""
        self.client.loop_write()
        self.socket.flush()
        stream, self.raw.sent = BufferedSocket(Pieces([self.raw.sent])), b""
        packets: list[tuple[int, bytes]] = []
        while stream.has_read_ahead or not packets:
            try:
                packets.append(read_as_paho_does(stream))
            except BlockingIOError:
                break
        return packets

    def reply(self, payload: bytes, *, qos: int = 1) -> int | None:
        return self.client.publish_at_once(TOPIC, payload, b"\x00", qos=qos)


def identifiers(packets: list[tuple[int, bytes]]) -> list[int]:
    return [
        int.from_bytes(body[2 + len(TOPIC) : 4 + len(TOPIC)]) for header, body in packets if header & 0xF0 == PUBLISH
    ]


def ack(packet_id: int | None) -> bytes:
    assert packet_id is not None
    return b"\x40\x02" + struct.pack("!H", packet_id)


def test_no_more_is_sent_ahead_than_the_broker_takes_and_the_rest_follows_in_order() -> None:
    side = Side()
    replies = [side.reply(b"%d" % number) for number in range(5)]
    assert identifiers(side.heard()) == replies[:3]
    side.hears(ack(replies[1]))
    assert identifiers(side.heard()) == [replies[3]]
    side.hears(ack(replies[0]) + ack(replies[2]))
    assert identifiers(side.heard()) == [replies[4]]
    assert side.acknowledged == [replies[1], replies[0], replies[2]]


def test_what_paho_sends_counts_too_and_both_get_their_places() -> None:
    side = Side()
    own = side.client.publish("status", b"s", 1, True).mid
    replies = [side.reply(b"r") for _ in range(3)]
    assert len({own, *replies}) == 4
    assert len(side.heard()) == 3
    side.hears(ack(replies[0]) + ack(own))
    assert identifiers(side.heard()) == [replies[2]]
    assert side.acknowledged == [replies[0], own]
    later = side.client.publish("status", b"t", 1, True).mid
    side.hears(ack(replies[1]), ack(replies[2]))
    assert len(side.heard()) == 1
    side.hears(ack(later))
    assert side.acknowledged[-1] == later


def test_packet_ids_in_use_are_not_given_again() -> None:
    side = Side()
    first = side.reply(b"r")
    side.client._last_mid = 65535 if first == 1 else (first or 1) - 1
    assert side.reply(b"r") != first


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_acknowledgements_count_once_however_their_bytes_come(cuts: list[int]) -> None:
    side = Side()
    replies = [side.reply(b"r") for _ in range(3)]
    stream = b"".join(ack(each) for each in replies)
    pieces, at = [], 0
    for cut in (*cuts, len(stream)):
        if at < len(stream):
            pieces.append(stream[at : at + cut])
        at += cut
    side.hears(*pieces)
    assert side.acknowledged == replies
    assert side.client._inflight_messages == 0


def test_a_request_is_taken_and_acknowledged_at_once() -> None:
    side = Side()
    body = struct.pack("!H", 1) + b"t" + struct.pack("!H", 7) + b"\x00" + b"payload"
    side.hears(b"\x32" + with_length(body))
    assert [publication.payload for publication in side.received] == [b"payload"]
    assert side.heard() == [(PUBACK, b"\x00\x07")]


@pytest.mark.parametrize("topic", ["", "a/+", "a/#", "x" * 65536])
def test_a_topic_that_no_message_can_have_is_left_for_paho_to_refuse(topic: str) -> None:
    assert Side().client.publish_at_once(topic, b"", None, qos=1) is None


def test_what_cannot_be_written_now_is_paho_s_to_send_later() -> None:
    side = Side()
    side.client.publish("status", b"s", 0, False)
    packet_id = side.reply(b"r")
    assert [header & 0xF0 for header, _ in side.heard()] == [PUBLISH, PUBLISH]
    side.hears(ack(packet_id))
    assert side.acknowledged == [packet_id]
