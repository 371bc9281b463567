"""Spans to a real OTLP/gRPC server: over TLS, with certificates and headers, while it fails, and while it is away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest

from controller.api.collector_client import CollectorClient, CollectorSettings, parse_headers
from controller.demo.ports import free_port
from controller.traces.forward import Accepted, Forwarder, Later, Never
from controller.traces.intake import Intake
from controller.traces.service import Traces
from controller.traces.spool import Spool, SpoolBounds
from core.addresses import Address
from core.backoff import BackoffPolicy
from core.clock import SystemClock
from core.errors import InvalidRequest
from tests.support.https_certificate import TestAuthority
from tests.support.otlp import made_otlp_span, made_request
from tests.support.otlp_collector import Collector, collecting
from tests.support.trace_store import MemoryTraceStore

AUTHORITY = TestAuthority()
FAST = BackoffPolicy(base_s=0.01, cap_s=0.05)
PAYLOAD = made_request(made_otlp_span(), made_otlp_span()).SerializeToString()


class Files:
    """What an operator has: the collector's authority, a certificate with its key, and headers."""

    def __init__(self, folder: Path) -> None:
        pair = AUTHORITY.pair()
        self.authority = _written(folder / "authority.pem", AUTHORITY.bundle.encode())
        self.certificate = _written(folder / "client.pem", pair.chain)
        self.key = _written(folder / "client-key.pem", pair.key)
        self.headers = _written(folder / "headers", b"# for the tracing service\n\nAuthorization: Bearer s3cret\n")

    def settings(self, address: Address) -> CollectorSettings:
        return CollectorSettings(address, self.authority, self.certificate, self.key, self.headers)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def tls(*, asks_for_certificates: bool = True, authority: TestAuthority = AUTHORITY) -> grpc.ServerCredentials:
    pair = authority.pair()
    return grpc.ssl_server_credentials(
        [(pair.key, pair.chain)],
        AUTHORITY.bundle.encode() if asks_for_certificates else None,
        require_client_auth=asks_for_certificates,
    )


@asynccontextmanager
async def client_of(settings: CollectorSettings) -> AsyncIterator[CollectorClient]:
    client = CollectorClient(settings)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def forwarding(client: CollectorClient, folder: Path) -> AsyncIterator[Forwarder]:
    bounds = SpoolBounds(1 << 20, 3600.0)
    forwarder = Forwarder(client, partial(Spool, folder, bounds), clock=SystemClock(), max_age_s=3600.0, backoff=FAST)
    task = asyncio.create_task(forwarder.run())
    try:
        yield forwarder
    finally:
        task.cancel()
        await asyncio.wait([task])
        await forwarder.close()


async def test_spans_go_over_mutual_tls_with_the_headers_of_the_file(files: Files) -> None:
    collector = Collector()
    async with (
        collecting(collector, credentials=tls()) as address,
        client_of(files.settings(address)) as client,
    ):
        assert await client.export(PAYLOAD) == Accepted()
    assert [request.SerializeToString() for request in collector.received] == [PAYLOAD]
    assert collector.headers[0]["authorization"] == "Bearer s3cret"


async def test_a_collector_of_another_authority_gets_nothing(files: Files) -> None:
    collector = Collector()
    credentials = tls(asks_for_certificates=False, authority=TestAuthority())
    async with (
        collecting(collector, credentials=credentials) as address,
        client_of(files.settings(address)) as client,
    ):
        assert isinstance(await client.export(PAYLOAD), Later)
    assert collector.received == []


async def test_a_collector_that_wants_a_certificate_takes_nothing_without_one(files: Files) -> None:
    collector = Collector()
    async with (
        collecting(collector, credentials=tls()) as address,
        client_of(CollectorSettings(address, files.authority)) as client,
    ):
        assert isinstance(await client.export(PAYLOAD), Later)
    assert collector.received == []


async def test_headers_and_certificates_that_change_are_used_from_then_on(files: Files) -> None:
    collector = Collector()
    async with (
        collecting(collector, credentials=tls()) as address,
        client_of(files.settings(address)) as client,
    ):
        await client.export(PAYLOAD)
        renewed = AUTHORITY.pair()
        files.certificate.write_bytes(renewed.chain)
        files.key.write_bytes(renewed.key)
        replacement = files.headers.with_name("headers.new")
        replacement.write_text("authorization: Bearer an0ther\n")
        replacement.replace(files.headers)
        assert await client.export(PAYLOAD) == Accepted()
        files.headers.unlink()
        assert isinstance(await client.export(PAYLOAD), Later)
    assert [headers["authorization"] for headers in collector.headers] == ["Bearer s3cret", "Bearer an0ther"]


async def test_in_the_clear_only_a_collector_on_this_machine_is_spoken_to() -> None:
    assert not CollectorSettings(Address("127.0.0.1", 4317)).speaks_tls
    assert CollectorSettings(Address("collector.example", 4317)).speaks_tls
    collector = Collector()
    async with collecting(collector) as address, client_of(CollectorSettings(address)) as client:
        assert await client.export(PAYLOAD) == Accepted()


async def test_without_files_the_authorities_of_the_machine_are_believed(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files.authority))
    collector = Collector()
    async with collecting(collector, credentials=tls()) as address:
        settings = replace(files.settings(address), authority=None)
        async with client_of(settings) as client:
            assert await client.export(PAYLOAD) == Accepted()


@pytest.mark.parametrize(
    ("status", "retry_after_s", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, None, Later("UNAVAILABLE: not now")),
        (grpc.StatusCode.UNAVAILABLE, 0.25, Later("UNAVAILABLE: not now", 0.25)),
        (grpc.StatusCode.UNAVAILABLE, 4.0, Later("UNAVAILABLE: not now", 4.0)),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, Never("RESOURCE_EXHAUSTED: not now")),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.5, Later("RESOURCE_EXHAUSTED: not now", 0.5)),
        (grpc.StatusCode.ABORTED, None, Later("ABORTED: not now")),
        (grpc.StatusCode.OUT_OF_RANGE, None, Later("OUT_OF_RANGE: not now")),
        (grpc.StatusCode.DATA_LOSS, None, Later("DATA_LOSS: not now")),
        (grpc.StatusCode.INVALID_ARGUMENT, 0.5, Never("INVALID_ARGUMENT: not now")),
        (grpc.StatusCode.UNAUTHENTICATED, None, Never("UNAUTHENTICATED: not now")),
        (grpc.StatusCode.INTERNAL, None, Never("INTERNAL: not now")),
    ],
)
async def test_what_may_be_tried_again_is_what_the_specification_says(
    status: grpc.StatusCode, retry_after_s: float | None, expected: Later | Never
) -> None:
    collector = Collector()
    collector.status, collector.retry_after_s = status, retry_after_s
    async with collecting(collector) as address, client_of(CollectorSettings(address)) as client:
        assert await client.export(PAYLOAD) == expected


async def test_spans_that_were_rejected_in_part_are_told() -> None:
    collector = Collector()
    collector.rejected_spans = 1
    async with collecting(collector) as address, client_of(CollectorSettings(address)) as client:
        assert await client.export(PAYLOAD) == Accepted(rejected=1)


async def test_a_collector_that_dies_and_comes_back_gets_everything_in_order(files: Files, tmp_path: Path) -> None:
    before, after = Collector(), Collector()
    names = [f"{number:03}" for number in range(60)]
    address = Address("127.0.0.1", free_port())
    async with (
        client_of(files.settings(address)) as client,
        forwarding(client, tmp_path / "spool") as forwarder,
    ):
        async with collecting(before, port=address.port, credentials=tls()):
            for name in names[:30]:
                forwarder.offer(made_request(made_otlp_span(name=name)))
            # Gone in the middle of the stream, at once.
            await before.has_received(1)
        for name in names[30:]:
            forwarder.offer(made_request(made_otlp_span(name=name)))
        async with collecting(after, port=address.port, credentials=tls()):
            await after.has_named(names[-1])
    received = before.names + after.names
    assert sorted(set(received)) == names
    # At least once, and in order: twice came only what the first had taken and could no longer say so.
    assert before.names == names[: len(before.names)]
    assert after.names == sorted(set(after.names))


async def test_requests_are_passed_on_as_they_came(tmp_path: Path) -> None:
    collector = Collector()
    request = made_request(made_otlp_span(), made_otlp_span(span_id=b"bad"))
    async with (
        collecting(collector) as address,
        client_of(CollectorSettings(address)) as client,
        forwarding(client, tmp_path / "spool") as forwarder,
    ):
        intake = Intake(Traces(MemoryTraceStore(), max_spans=100), forwarder)
        await intake.take_in(request)
        await collector.has_received(1)
        await intake.close()
    assert collector.received == [request]


def test_a_file_that_cannot_be_used_is_told_at_the_start(files: Files) -> None:
    settings = files.settings(Address("collector.example", 4317))
    for path in settings.files:
        content = path.read_bytes()
        path.write_bytes(b"\x00 neither PEM nor a header")
        with pytest.raises(InvalidRequest, match=path.name):
            CollectorClient(settings)
        path.unlink()
        with pytest.raises(InvalidRequest, match=path.name):
            CollectorClient(settings)
        path.write_bytes(content)


def test_a_line_that_is_no_header_is_named_by_its_number_and_not_quoted() -> None:
    path = Path("headers")
    assert parse_headers("a: b\n# no\n\nX-Y: c d", source=path) == (("a", "b"), ("x-y", "c d"))
    for line in ("s3cret", "na me: s3cret", "grpc-timeout: s3cret", "key-bin: s3cret", "a: s3crét"):
        with pytest.raises(InvalidRequest, match="line 2") as told:
            parse_headers(f"a: b\n{line}", source=path)
        assert "cr" not in str(told.value)
