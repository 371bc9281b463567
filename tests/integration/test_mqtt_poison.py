"""A broker that hangs up over one reply: the reply goes out a second time, and no third."""

import asyncio
from typing import cast

from edge_agent.front.mqtt.publication import Publication
from tests.support.edge_front import CLIENT, REPLIES, REQUESTS, TIMEOUT_S, body_of, serving
from tests.support.edge_plane import echo_model
from tests.support.mosquitto import Mosquitto

_CONNACK = b"\x20\x02\x00\x00"
_PUBLISH, _SUBSCRIBE = 3, 8


class TouchyBroker:
    """Takes MQTT 3.1.1 connections and the status of an agent; ends each that brings a reply."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.replies = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.write(_CONNACK)
        try:
            while True:
                kind, packet = await read_packet(reader)
                if kind == _SUBSCRIBE:
                    writer.write(b"\x90\x03" + packet[:2] + b"\x00")
                elif kind == _PUBLISH and REPLIES.encode() in packet:
                    self.replies += 1
                    return
                elif kind == _PUBLISH:
                    at = 2 + int.from_bytes(packet[:2], "big")
                    writer.write(b"\x40\x02" + packet[at : at + 2])
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()


async def read_packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    kind = (await reader.readexactly(1))[0] >> 4
    size = shift = 0
    while True:
        digit = (await reader.readexactly(1))[0]
        size |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            return kind, await reader.readexactly(size)


async def test_a_reply_over_which_the_broker_hangs_up_twice_is_given_up_and_counted() -> None:
    broker = TouchyBroker()
    server = await asyncio.start_server(broker.serve, broker.host, 0)
    broker.port = server.sockets[0].getsockname()[1]
    settings = {"protocol": 4}
    async with server, serving(cast("Mosquitto", broker), echo_model(), settings=settings) as front:
        front.receive(Publication(f"{REQUESTS}/{CLIENT}/r1".encode(), body_of(), qos=1, packet_id=1))
        async with asyncio.timeout(TIMEOUT_S):
            while broker.connections < 3 or not front.counters.late:
                await asyncio.sleep(0.01)
        assert (broker.replies, front.counters.late, front.counters.replied) == (2, 1, 0)
