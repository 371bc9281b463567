"""The relay by which `benchmarks.footprint` counts what an agent and its controller say to each other."""

import asyncio
import time

from benchmarks.idle_traffic import CountingRelay
from core.addresses import Address

TIMEOUT_S = 10.0


async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    asked = await reader.readexactly(3)
    writer.write(asked * 2)
    await reader.read()
    writer.close()


async def ask(address: Address) -> bytes:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(b"abc")
    async with asyncio.timeout(TIMEOUT_S):
        answer = await reader.readexactly(6)
        writer.close()
        await reader.read()
    return answer


def bytes_of(relay: CountingRelay, sender: str, *, since_s: float) -> int:
    return sum(passed.size_bytes for passed in relay.since(since_s) if passed.sender == sender)


async def test_the_relay_counts_both_directions_of_every_connection_also_of_those_that_ended() -> None:
    server = await asyncio.start_server(answer_twice, "127.0.0.1", 0)
    began_s = time.monotonic()
    async with server, CountingRelay(Address(*server.sockets[0].getsockname()[:2])) as relay:
        assert [await ask(relay.address) for _ in range(2)] == [b"abcabc", b"abcabc"]
        counted = bytes_of(relay, "agent", since_s=began_s), bytes_of(relay, "controller", since_s=began_s)
        later_s = time.monotonic()
        await ask(relay.address)
        assert bytes_of(relay, "controller", since_s=later_s) == 6
    assert counted == (6, 12)


async def test_a_connection_under_way_ends_with_the_relay_for_both() -> None:
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer_twice(reader, writer)
        ended.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, asyncio.timeout(TIMEOUT_S):
        async with CountingRelay(Address(*server.sockets[0].getsockname()[:2])) as relay:
            reader, writer = await asyncio.open_connection(relay.address.host, relay.address.port)
            writer.write(b"abc")
            await reader.readexactly(6)
            assert relay.connections == 1
        assert relay.connections == 0
        assert await reader.read() == b""
        await ended.wait()
        writer.close()
