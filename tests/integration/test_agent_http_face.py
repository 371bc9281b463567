"""The agent's local HTTP face: what it serves, and what no peer can make it do."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.addresses import Address
from core.errors import Unavailable
from edge_agent.front.http import Answer, HttpFront, HttpLimits, Request

QUICK = HttpLimits(head_bytes=1024, head_timeout_s=0.3, write_timeout_s=0.3, connections=2)
TIMEOUT_S = 10.0
GET = b"GET /greeting HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def greet(request: Request) -> Answer:
    return Answer(f"hello {request.query} {request.headers.get('accept', '')}".encode())


async def pour(_request: Request) -> Answer:
    return Answer(b"x" * (64 << 20))


async def stumble(_request: Request) -> Answer:
    raise RuntimeError("a secret of the code")


ROUTES = {"/greeting": greet, "/flood": pour, "/defect": stumble}


@asynccontextmanager
async def face(limits: HttpLimits | None = None) -> AsyncIterator[Address]:
    front = HttpFront(Address("127.0.0.1", 0), ROUTES, limits=limits)
    address = await front.start()
    try:
        yield address
    finally:
        await front.stop()


async def exchange(address: Address, request: bytes) -> bytes:
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            writer.write(request)
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.transport.abort()


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1]) if reply else 0


def fields_of(reply: bytes) -> Mapping[str, str]:
    lines = reply.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def test_a_route_answers_with_query_and_headers_and_the_connection_ends() -> None:
    async with face() as address:
        reply = await exchange(address, b"GET /greeting?to=you HTTP/1.1\r\nHost: 127.0.0.1:1\r\nAccept: text/*\r\n\r\n")

    assert reply.partition(b"\r\n\r\n")[2] == b"hello to=you text/*"
    fields = fields_of(reply)
    assert (fields["connection"], fields["content-length"], fields["cache-control"]) == ("close", "19", "no-store")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST /greeting HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /greeting HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"GET /greeting HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /greeting HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET /greeting HTTP/1.1\r\n\r\n", 421),
        (b"GET /greeting HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200),
        (b"GET /greeting HTTP/1.1\r\nHost: localhost\r\n folded: x\r\n\r\n", 400),
        (b"GET http://localhost/greeting HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /greeting HTTP/2\r\nHost: localhost\r\n\r\n", 400),
        (b"get /greeting HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
    ],
)
async def test_what_is_no_request_for_us_is_told_so(request_: bytes, status: int) -> None:
    async with face() as address:
        assert status_of(await exchange(address, request_)) == status


async def test_a_defect_is_told_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    async with face() as address:
        reply = await exchange(address, b"GET /defect HTTP/1.1\r\nHost: localhost\r\n\r\n")

    assert status_of(reply) == 500
    assert b"secret" not in reply
    assert "failed by a defect" in caplog.text


async def test_who_sends_a_head_byte_by_byte_is_cut_off_in_time() -> None:
    async with face(QUICK) as address, asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        reading = asyncio.ensure_future(reader.read())
        for byte in GET[:-2] * 50:
            writer.write(bytes([byte]))
            await asyncio.wait([reading], timeout=0.02)
            if reading.done():
                break
        assert status_of(reading.result()) == 408
        writer.transport.abort()


async def test_who_does_not_read_its_answer_is_cut_off_in_time() -> None:
    async with face(QUICK) as address, asyncio.timeout(TIMEOUT_S):
        _, stuck = await asyncio.open_connection(address.host, address.port, limit=1024)
        stuck.write(GET.replace(b"greeting", b"flood"))
        # Its place is free again although it never read.
        while status_of(await exchange(address, GET)) != 200:
            await asyncio.sleep(0.01)
        stuck.transport.abort()


async def test_connections_beyond_the_bound_are_closed_and_others_served_after() -> None:
    async with face(QUICK) as address, asyncio.timeout(TIMEOUT_S):
        held = [await asyncio.open_connection(address.host, address.port) for _ in range(QUICK.connections)]
        refused = await exchange(address, GET)
        for _, writer in held:
            writer.transport.abort()
        while status_of(await exchange(address, GET)) != 200:
            await asyncio.sleep(0.01)

    assert refused == b""


async def test_stopping_does_not_wait_for_those_who_hang_on() -> None:
    async with asyncio.timeout(TIMEOUT_S):
        async with face() as address:
            reader, writer = await asyncio.open_connection(address.host, address.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.transport.abort()


async def test_a_port_in_use_is_named_with_its_setting() -> None:
    async with face() as address:
        with pytest.raises(Unavailable, match="choose another http_bind"):
            await HttpFront(address, ROUTES).start()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300) | st.binary(max_size=60).map(lambda tail: GET[:-2] + tail + b"\r\n\r\n"))
def test_no_bytes_make_it_fail_or_hang(noise: bytes) -> None:
    async def scene() -> tuple[int, int]:
        async with face(QUICK) as address:
            return status_of(await exchange(address, noise + b"\r\n\r\n")), status_of(await exchange(address, GET))

    first, then = asyncio.run(scene())
    assert first in {200, 400, 404, 405, 421, 431}
    assert then == 200
