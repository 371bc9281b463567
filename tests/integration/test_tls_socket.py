"""TLS on a socket that does not block: whole streams both ways, whatever the sizes, and ends that say why."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_agent.front.mqtt.tls_socket import TlsSocket, shake_hands
from tests.support.mosquitto import HOST
from tests.support.site_broker import Site

CONTENT = bytes(range(256)) * 4096
TIMEOUT_S = 10.0


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = await Site.made(tmp_path)
    made.certify_broker()
    yield made
    made.close()


def server_context(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "identity.pem")
    context.load_verify_locations(folder / "trust.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@asynccontextmanager
async def connected(site: Site, folder: Path) -> AsyncIterator[tuple[TlsSocket, ssl.SSLSocket]]:
    """Yield the agent's end, and the broker's, which blocks."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(TIMEOUT_S)
    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(server_context(folder).wrap_socket, theirs, server_side=True)
        client = await shake_hands(ours, site.device("cam-1"), server_name=HOST)
        server = serving.result()
        try:
            yield client, server
        finally:
            client.close()
            server.close()


async def read(client: TlsSocket, size: int) -> bytes:
    """Return the next bytes, once the kernel has some."""
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        loop.add_reader(client.fileno(), readable.set)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await readable.wait()
            return client.recv(size)
        except BlockingIOError:
            continue
        finally:
            loop.remove_reader(client.fileno())


@pytest.mark.parametrize("size", [1, 100, 16_384, 100_000, 1 << 20])
async def test_whatever_is_asked_for_nothing_stays_where_no_loop_sees_it(site: Site, tmp_path: Path, size: int) -> None:
    async with connected(site, tmp_path / "broker") as (client, server):
        with ThreadPoolExecutor(1) as thread:
            sending = thread.submit(server.sendall, CONTENT)
            came = bytearray()
            while len(came) < len(CONTENT):
                came += await read(client, size)
            sending.result()

    assert bytes(came) == CONTENT


async def test_what_the_peer_does_not_take_is_sent_later_and_whole(site: Site, tmp_path: Path) -> None:
    async with connected(site, tmp_path / "broker") as (client, server):
        unsent = bytearray(CONTENT)
        while send(client, unsent):
            pass
        assert unsent
        # More is written behind what waits, as `BufferedSocket` does.
        unsent += CONTENT
        with ThreadPoolExecutor(1) as thread:
            receiving = thread.submit(received, server, 2 * len(CONTENT))
            while unsent:
                if not send(client, unsent):
                    await asyncio.sleep(0.001)
            assert receiving.result() == CONTENT + CONTENT


def send(client: TlsSocket, unsent: bytearray) -> bool:
    """Send a part of it; say whether the kernel took any."""
    try:
        del unsent[: client.send(unsent)]
    except BlockingIOError:
        return False
    return bool(unsent)


def received(server: ssl.SSLSocket, size: int) -> bytes:
    came = bytearray()
    while len(came) < size:
        came += server.recv(size)
    return bytes(came)


async def test_what_came_before_the_end_is_not_lost(site: Site, tmp_path: Path) -> None:
    async with connected(site, tmp_path / "broker") as (client, server):
        server.sendall(b"last words")
        server.close()
        assert await read(client, 1 << 16) == b"last words"
        assert await read(client, 1 << 16) == b""


async def test_a_refusal_after_the_handshake_says_why(site: Site, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(TIMEOUT_S)
    context = server_context(tmp_path / "broker")
    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(context.wrap_socket, theirs, server_side=True)
        # With TLS 1.3 this side is done before the other has looked at its certificate.
        client = await shake_hands(ours, site.of_another_fleet("cam-1@berlin"), server_name=HOST)
        with pytest.raises(ssl.SSLError):
            serving.result()
    with pytest.raises(ssl.SSLError):
        await read(client, 100)
    client.close()
    theirs.close()

    assert "UNKNOWN_CA" in (client.fault or "")


async def test_a_handshake_that_is_given_up_leaves_no_socket(site: Site) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await shake_hands(ours, site.device("cam-1"), server_name=HOST)
    theirs.settimeout(TIMEOUT_S)
    # Its greeting, and then the end.
    while theirs.recv(1 << 16):
        pass
    theirs.close()


@pytest.mark.parametrize("name", ["", ".example", "a..b", "x" * 64 + ".example", "a\0b"])
async def test_a_name_that_nobody_can_have_is_an_error(site: Site, name: str) -> None:
    ours, theirs = socket.socketpair()
    with pytest.raises(OSError, match="server name"):
        await shake_hands(ours, site.device("cam-1"), server_name=name)
    theirs.settimeout(TIMEOUT_S)
    assert theirs.recv(1) == b""
    theirs.close()


async def test_a_peer_that_speaks_no_tls_is_an_error(site: Site) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(b"SSH-2.0-broker\r\n" * 10)
    with pytest.raises(OSError, match="WRONG_VERSION_NUMBER"):
        await shake_hands(ours, site.device("cam-1"), server_name=HOST)
    theirs.close()
