"""The HTTP port over TLS: a real port, real certificates, replaced while it is open."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from starlette.types import ASGIApp, Receive, Scope, Send

from controller.access.model import OperatorRole
from controller.api.http_connections import BoundedConnection
from controller.api.http_server import HttpServer
from controller.api.http_tls import CertificateFiles, ServerCertificate, read_certificate
from core.addresses import Address
from core.atomic_files import write_atomically
from core.errors import InvalidRequest
from tests.support.guarded import guarded_side
from tests.support.https_certificate import Pair, TestAuthority

HERE = Address("127.0.0.1", 0)


@pytest.fixture(scope="module")
def authority() -> TestAuthority:
    return TestAuthority()


async def say_scheme(scope: Scope, _receive: Receive, send: Send) -> None:
    body = f"{scope['scheme']} {scope['client'][0]}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(certificate: ServerCertificate | None, app: ASGIApp = say_scheme) -> AsyncIterator[HttpServer]:
    server = HttpServer(HERE, certificate=certificate)
    task = asyncio.create_task(server.run(app))
    try:
        yield server
    finally:
        server.stop()
        await task
        server.close()


def client_of(server: HttpServer, authority: TestAuthority) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, verify=authority.client_context())


async def shown_serial(server: HttpServer, context: ssl.SSLContext, *, name: str | None = "127.0.0.1") -> int:
    """Shake hands; return the serial number of the certificate that the server shows."""
    where = (server.address.host, server.address.port)
    _, writer = await asyncio.open_connection(*where, ssl=context, server_hostname=name)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return x509.load_der_x509_certificate(shown).serial_number


async def test_the_port_speaks_tls_and_its_requests_know_it(authority: TestAuthority) -> None:
    pair = authority.pair()
    async with serving(ServerCertificate(pair.chain, pair.key)) as server, client_of(server, authority) as http:
        response = await http.get("/", headers={"x-forwarded-for": "192.0.2.9", "x-forwarded-proto": "http"})

    assert server.url.startswith("https://127.0.0.1:")
    assert response.text == "https 127.0.0.1"


async def test_without_a_certificate_it_speaks_in_clear_and_believes_no_forwarded_headers() -> None:
    async with serving(None) as server, httpx.AsyncClient(base_url=server.url) as http:
        response = await http.get("/", headers={"x-forwarded-for": "192.0.2.9", "x-forwarded-proto": "https"})

    assert response.text == "http 127.0.0.1"


async def test_a_client_in_clear_gets_nothing(authority: TestAuthority) -> None:
    pair = authority.pair()
    async with (
        serving(ServerCertificate(pair.chain, pair.key)) as server,
        httpx.AsyncClient(base_url=f"http://{server.address}") as http,
    ):
        with pytest.raises(httpx.TransportError):
            await http.get("/")


async def test_a_client_of_another_authority_refuses_the_port(authority: TestAuthority) -> None:
    pair = TestAuthority().pair()
    async with serving(ServerCertificate(pair.chain, pair.key)) as server, client_of(server, authority) as http:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await http.get("/")


async def test_what_is_older_than_tls_1_2_is_refused(authority: TestAuthority) -> None:
    pair = authority.pair()
    certificate = ServerCertificate(pair.chain, pair.key)

    assert certificate.context.minimum_version is ssl.TLSVersion.TLSv1_2
    old = authority.client_context()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serving(certificate) as server:
        with pytest.raises((ssl.SSLError, OSError)):
            await shown_serial(server, old)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_another_certificate_is_shown_from_the_next_handshake_on(
    authority: TestAuthority, version: ssl.TLSVersion
) -> None:
    first, second = authority.pair(), authority.pair()
    certificate = ServerCertificate(first.chain, first.key)
    context = authority.client_context()
    context.maximum_version = version
    async with serving(certificate) as server, httpx.AsyncClient(base_url=server.url, verify=context) as http:
        await http.get("/")
        assert await shown_serial(server, context) == first.serial
        certificate.replace(second.chain, second.key)
        assert await shown_serial(server, context) == second.serial
        # The connection from before lives on.
        assert (await http.get("/")).is_success


async def test_a_key_of_another_kind_replaces_the_old_one_wholly(authority: TestAuthority) -> None:
    first, second = authority.pair(), authority.pair(kind=rsa.RSAPrivateKey)
    certificate = ServerCertificate(first.chain, first.key)
    certificate.replace(second.chain, second.key)
    async with serving(certificate) as server:
        assert await shown_serial(server, authority.client_context()) == second.serial


async def test_a_client_that_names_no_server_gets_the_newest_too(authority: TestAuthority) -> None:
    first, second = authority.pair(), authority.pair()
    certificate = ServerCertificate(first.chain, first.key)
    certificate.replace(second.chain, second.key)
    context = authority.client_context()
    context.check_hostname = False
    async with serving(certificate) as server:
        where = (server.address.host, server.address.port)

        def shake_hands() -> bytes:
            with socket.create_connection(where) as plain, context.wrap_socket(plain) as connection:
                return connection.getpeercert(binary_form=True) or b""

        shown = await asyncio.to_thread(shake_hands)
    assert x509.load_der_x509_certificate(shown).serial_number == second.serial


async def test_a_pair_that_does_not_fit_is_refused_and_the_old_one_stays(authority: TestAuthority) -> None:
    first, other = authority.pair(), authority.pair()
    certificate = ServerCertificate(first.chain, first.key)
    for chain, key in (
        (first.chain, other.key),
        (b"", b""),
        (first.chain, b"no key"),
        (first.chain, encrypted(first.key)),
    ):
        with pytest.raises(InvalidRequest, match="unencrypted key in PEM"):
            certificate.replace(chain, key)
    async with serving(certificate) as server:
        assert await shown_serial(server, authority.client_context()) == first.serial


def encrypted(key: bytes) -> bytes:
    loaded = load_pem_private_key(key, None)
    return loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.pem"):
        read_certificate(tmp_path / "missing.pem", tmp_path / "key.pem")


class _Impatient(BoundedConnection):
    head_timeout_s = 0.2
    max_per_address = 3


@asynccontextmanager
async def impatient() -> AsyncIterator[asyncio.Server]:
    """Serve connections with small bounds, in clear."""
    config = uvicorn.Config(say_scheme, log_config=None, lifespan="off", ws="none", timeout_keep_alive=60)
    state = uvicorn.Server(config).server_state

    def connection() -> asyncio.Protocol:
        return _Impatient(config, state, app_state={})

    async with await asyncio.get_running_loop().create_server(connection, HERE.host, 0) as server:
        yield server


async def dialled(server: asyncio.Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*server.sockets[0].getsockname())


async def is_cut(reader: asyncio.StreamReader) -> bool:
    """Say whether the connection ends, soon and without an answer."""
    async with asyncio.timeout(5):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_a_connection_without_a_whole_head_is_cut(head: bytes) -> None:
    async with impatient() as server:
        reader, writer = await dialled(server)
        writer.write(head)

        assert await is_cut(reader)
        writer.close()


async def test_a_second_head_that_never_ends_is_cut() -> None:
    async with impatient() as server:
        reader, writer = await dialled(server)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(b"http 127.0.0.1"))
        writer.write(b"GET / HT")

        assert await is_cut(reader)
        writer.close()


async def test_one_address_has_no_more_than_its_share_of_connections() -> None:
    async with impatient() as server:
        held = [await dialled(server) for _ in range(3)]
        reader, writer = await dialled(server)

        # Well before the others, whose heads are late.
        assert await is_cut(reader)
        assert not held[0][0].at_eof()
        for _, each in [*held, (reader, writer)]:
            each.close()


async def test_a_browser_signs_in_over_tls(authority: TestAuthority, tmp_path: Path) -> None:
    pair = authority.pair()
    async with (
        guarded_side(tmp_path) as guarded,
        serving(ServerCertificate(pair.chain, pair.key), guarded.app) as server,
        client_of(server, authority) as browser,
    ):
        origin = {"origin": server.url, "sec-fetch-site": "same-origin"}
        form = {"secret": guarded.secrets[OperatorRole.ADMIN]}
        signed_in = await browser.post("/sign-in", data=form, headers=origin)
        me = (await browser.get("/api/me")).json()
        token = {"x-csrf-token": me["session"]["csrf_token"]}
        added = await browser.post("/api/operators", json={"name": "bob", "role": "viewer"}, headers=origin | token)

    assert signed_in.headers["set-cookie"].startswith("__Host-")
    assert me["name"] == "the-admin"
    assert added.status_code == 201


def write(folder: Path, pair: Pair) -> tuple[Path, Path]:
    """Put a pair into an operator's two files, as the tools that renew certificates do."""
    chain, key = folder / "own.pem", folder / "own.key"
    for path, content in ((chain, pair.chain), (key, pair.key)):
        write_atomically(path, content)
    return chain, key


async def test_an_operators_own_files_are_shown_anew_when_they_change(authority: TestAuthority, tmp_path: Path) -> None:
    first, second = authority.pair(), authority.pair()
    files = CertificateFiles(*write(tmp_path, first))
    async with serving(files.certificate) as server:
        assert await shown_serial(server, authority.client_context()) == first.serial

        write(tmp_path, second)
        files.look()

        assert await shown_serial(server, authority.client_context()) == second.serial


async def test_a_broken_pair_leaves_the_old_one_and_is_logged_once(
    authority: TestAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = authority.pair(), authority.pair()
    files = CertificateFiles(*write(tmp_path, first))
    async with serving(files.certificate) as server:
        # The chain of one beside the key of another: half of a renewal.
        write_atomically(tmp_path / "own.pem", second.chain)
        files.look()
        files.look()
        assert await shown_serial(server, authority.client_context()) == first.serial
        assert [record.levelno for record in caplog.records] == [logging.ERROR]

        write_atomically(tmp_path / "own.key", second.key)
        files.look()

        assert await shown_serial(server, authority.client_context()) == second.serial
