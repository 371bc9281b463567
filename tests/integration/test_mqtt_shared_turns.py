"""What comes while a few packets are taken is taken in the same turn of the loop, within bounds."""

import asyncio
import socket
import time

import pytest

from edge_agent.front.mqtt.connection import BrokerConnection, ConnectionSettings, Will
from edge_agent.front.mqtt.publication import Publication, with_length

_CONNACK = b"\x20\x02\x00\x00"
_SUBACK = b"\x90\x03\x00\x01\x00"
_DELIVERED_S = 0.02


class Script:
    """A broker that sends the next of `lines`, a request for each letter, as soon as the first of one is taken."""

    def __init__(self, *lines: str) -> None:
        # What was taken, with a bar wherever a turn of the loop ended.
        self.taken = ""
        self.is_over = asyncio.Event()
        self._lines = list(lines)
        self._last = lines[-1][-1]
        self._awaited = ""

    async def serve(self, listening: socket.socket) -> socket.socket:
        self._agent, _ = await asyncio.get_running_loop().sock_accept(listening)
        self._agent.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the agent says does not matter here.
        self._agent.sendall(_CONNACK + _SUBACK)
        return self._agent

    def send_next(self) -> None:
        line = self._lines.pop(0)
        self._awaited = line[0]
        self._agent.sendall(b"".join([b"\x30" + with_length(b"\x00\x01t" + letter.encode()) for letter in line]))
        # Loopback delivers at once, or a moment later on a busy machine; the loop stands still meanwhile.
        time.sleep(_DELIVERED_S)

    def receive(self, publication: Publication) -> None:
        letter = publication.payload.decode()
        self.taken += letter
        asyncio.get_running_loop().call_soon(self._end_turn)
        if letter == self._awaited and self._lines:
            self.send_next()
        if letter == self._last:
            self.is_over.set()

    def _end_turn(self) -> None:
        self.taken += "" if self.taken.endswith("|") else "|"


async def taken_from(script: Script) -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        settings = ConnectionSettings(
            host="127.0.0.1",
            port=listening.getsockname()[1],
            client_id="a",
            is_v5=False,
            keepalive_s=60,
            filters=[("t", 0)],
            receive_maximum=10,
            max_packet_bytes=1000,
        )
        connection = BrokerConnection(settings, Will("w", b""), receive=script.receive, acknowledged=lambda _id: None)
        async with asyncio.TaskGroup() as group:
            group.create_task(connection.open(), name="opening")
            agent = await script.serve(listening)
        with agent:
            script.send_next()
            async with asyncio.timeout(10):
                await script.is_over.wait()
            connection.abort("the test is over")
    return script.taken.removesuffix("|")


@pytest.mark.parametrize(
    ("lines", "taken"),
    [
        # What comes meanwhile shares the turn, up to a few times.
        (("a", "b"), "ab"),
        (("a", "b", "c", "d", "e"), "abc|de"),
        # Where there is enough for a turn, what comes waits for the next.
        (("abc", "d"), "abc|d"),
        (("a", "bcd", "e"), "abcd|e"),
    ],
)
async def test_requests_that_come_while_few_are_taken_share_their_turn(lines: tuple[str, ...], taken: str) -> None:
    assert await taken_from(Script(*lines)) == taken
