"""A broker that sends requests and takes no replies: the agent reads on only while it can keep what it says."""

import asyncio
import socket
from typing import cast

import orjson
import pytest

from edge_agent.front.mqtt.publication import with_length
from tests.integration.test_mqtt_poison import read_packet
from tests.support.edge_front import CLIENT, REPLIES, REQUESTS, body_of, serving
from tests.support.edge_plane import echo_model
from tests.support.mosquitto import Mosquitto

_CONNACK = b"\x20\x02\x00\x00"
_PUBLISH, _SUBSCRIBE = 3, 8
# More, and longer, than the kernel's buffers take.
_REQUESTS = 40_000
_ID_CHARS = 1000
# Real seconds without any progress.
_STUCK_S = 1.5


class DeafBroker:
    """Takes one MQTT 3.1.1 agent, asks it without end, and reads its replies only when told to."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self.port = 0
        self.sent = 0
        self.replies = 0
        self.listens = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_CONNACK)
        while (packet := await read_packet(reader))[0] != _SUBSCRIBE:
            pass
        writer.write(b"\x90\x03" + packet[1][:2] + b"\x00")
        # The reply has the request's id: both are as long as that.
        body = orjson.dumps({"id": "x" * _ID_CHARS, **orjson.loads(body_of(deadline_ms=60_000))})
        asking = asyncio.create_task(self._ask(writer, body), name="asking")
        try:
            await self.listens.wait()
            while True:
                kind, content = await read_packet(reader)
                self.replies += kind == _PUBLISH and REPLIES.encode() in content
        except asyncio.IncompleteReadError:
            return
        finally:
            asking.cancel()
            writer.close()

    async def _ask(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        for number in range(_REQUESTS):
            topic = f"{REQUESTS}/{CLIENT}/{number}".encode()
            writer.write(b"\x30" + with_length(len(topic).to_bytes(2, "big") + topic + body))
            await writer.drain()
            self.sent += 1


async def until_stuck(broker: DeafBroker) -> int:
    """Return how many requests were taken when no more are."""
    while True:
        before = broker.sent
        await asyncio.sleep(_STUCK_S)
        if broker.sent == before:
            return before


@pytest.fixture
async def deaf() -> DeafBroker:
    return DeafBroker()


async def test_an_agent_whose_broker_takes_no_replies_stops_reading_and_goes_on_when_it_does(deaf: DeafBroker) -> None:
    listening = socket.create_server((deaf.host, 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server = await asyncio.start_server(deaf.serve, sock=listening, limit=4096)
    deaf.port = server.sockets[0].getsockname()[1]
    async with server, serving(cast("Mosquitto", deaf), echo_model(), settings={"protocol": 4}) as front:
        async with asyncio.timeout(120):
            taken = await until_stuck(deaf)
        assert 0 < taken < _REQUESTS
        answered = front.counters.replied
        deaf.listens.set()
        async with asyncio.timeout(30):
            while deaf.replies <= answered:
                await asyncio.sleep(0.05)
