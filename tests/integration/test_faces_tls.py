"""The agent's own faces with TLS: who may ask, under what name it is known, and what a renewal changes."""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import orjson
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.addresses import Address, parse_address
from core.clock import SystemClock
from core.errors import Untrusted
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, SiteId
from core.metrics import Registry
from core.open_inference import protobuf_body
from core.spiffe import Role, agent_dns_name
from core.tls_files import folder_context, write_tls_identity
from edge_agent.front.local import LocalFaces
from edge_agent.front.tls import FacesTls
from edge_agent.identity.folder import Identity, IdentityFolder
from edge_agent.settings import AgentSettings, FacesSettings
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.support.agents_loop import on_the_agents_loop
from tests.support.certified import DOMAIN, FleetAuthority
from tests.support.edge_plane import echo_model, plane_with, request_of
from tests.support.enrolment import ROOT

AGENT = "gate-1"
NAME = agent_dns_name(AGENT)
TIMEOUT_S = 10.0
BODY = orjson.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [0, 9, 0]}]})


@dataclass
class Site:
    """An agent's faces, and those who ask them."""

    authority: FleetAuthority
    folder: IdentityFolder
    tls: FacesTls
    path: Path
    faces: Mapping[str, str] = field(default_factory=dict)

    def follow(self, tls: TlsIdentity) -> None:
        """Do as a renewal does."""
        self.folder.replace(identity_with(tls))
        self.tls.follow(tls)

    def client(self, role: Role = Role.DEVICE, *, authority: FleetAuthority | None = None) -> ssl.SSLContext:
        shown = (authority or self.authority).identity(role, name="cam-1")
        trusted = TlsIdentity(shown.certificate_chain, shown.private_key, self.authority.identity(role).trust_bundle)
        folder = self.path / f"{role}-{id(shown)}"
        write_tls_identity(folder, trusted)
        return folder_context(folder)

    async def ask(self, client: ssl.SSLContext, head: str = "POST /v2/models/digits/infer") -> tuple[int, bytes]:
        """Return status and body of one request over HTTP; 0: the connection was cut."""
        address = parse_address(self.faces["http"])
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=client, server_hostname=NAME)
            try:
                length = len(BODY) if head.startswith("POST") else 0
                writer.write(
                    f"{head} HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode()
                )
                writer.write(BODY[:length])
                reply = await reader.read()
            except (ConnectionError, ssl.SSLError):
                reply = b""
            finally:
                writer.transport.abort()
        return (int(reply.split(b" ", 2)[1]) if reply else 0), reply.partition(b"\r\n\r\n")[2]

    def channel(self, shown: TlsIdentity) -> grpc.aio.Channel:
        options = [("grpc.ssl_target_name_override", NAME)]
        return grpc.aio.secure_channel(self.faces["grpc"], shown.channel_credentials(), options=options)


def identity_with(tls: TlsIdentity) -> Identity:
    nobody, now = Address("127.0.0.1", 9), datetime.now(UTC)
    agent, site = AgentId(AGENT), SiteId("berlin")
    return Identity(
        agent, site, DOMAIN, nobody, nobody, hashlib.sha256(ROOT).hexdigest(), now, now + timedelta(days=7), tls
    )


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Site]:
    authority = FleetAuthority()
    tls = authority.identity(Role.AGENT, name=AGENT)
    folder = IdentityFolder(path / "identity")
    folder.replace(identity_with(tls))
    settings = AgentSettings(http_bind="127.0.0.1:0", grpc_bind="127.0.0.1:0", faces=FacesSettings(tls=True))
    with ThreadPoolExecutor(1) as disk:
        site = Site(authority, folder, FacesTls(folder, tls, trust_domain=DOMAIN, disk=disk), path)
        async with AsyncExitStack() as closing:
            plane = await plane_with(echo_model())
            closing.push_async_callback(plane.close)
            faces = LocalFaces(settings, plane, metrics=Registry(), version="1", clock=SystemClock(), tls=site.tls)
            site.faces = await faces.open(closing)
            yield site


@pytest.mark.parametrize("role", [Role.DEVICE, Role.APPLICATION])
@on_the_agents_loop
async def test_devices_and_applications_of_the_fleet_are_answered(tmp_path: Path, role: Role) -> None:
    async with running(tmp_path) as site:
        status, body = await site.ask(site.client(role))

    assert status == 200, body
    assert orjson.loads(body)["outputs"][0]["data"] == [0, 9, 0]


@pytest.mark.parametrize("role", [Role.AGENT, Role.HEAVY])
@on_the_agents_loop
async def test_other_roles_of_the_fleet_are_told_that_they_may_not_ask(tmp_path: Path, role: Role) -> None:
    async with running(tmp_path) as site:
        for head in ("POST /v2/models/digits/infer", "GET /v2/health/live", "GET /metrics"):
            status, body = await site.ask(site.client(role), head)
            assert (status, b"device or an application" in body) == (403, True)

        async with site.channel(site.authority.identity(role, name="cam-1")) as channel:
            for call in (
                GRPCInferenceServiceStub(channel).ModelInfer(protobuf_body.encode_request(request_of())),
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


@on_the_agents_loop
async def test_who_shows_no_certificate_or_one_of_another_fleet_is_not_spoken_to(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        anonymous = ssl.create_default_context(cadata=site.authority.identity(Role.DEVICE).trust_bundle.decode())
        for stranger in (anonymous, site.client(authority=FleetAuthority())):
            try:
                status, _ = await site.ask(stranger)
            except (ConnectionError, ssl.SSLError):
                status = 0
            assert status == 0
        shown = FleetAuthority().identity(Role.DEVICE)
        mixed = TlsIdentity(
            shown.certificate_chain, shown.private_key, site.authority.identity(Role.DEVICE).trust_bundle
        )
        async with site.channel(mixed) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await GRPCInferenceServiceStub(channel).ModelInfer(
                    protobuf_body.encode_request(request_of()), timeout=2.0
                )
        assert refused.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


@on_the_agents_loop
async def test_over_grpc_a_device_is_answered_and_its_health_check_too(tmp_path: Path) -> None:
    async with running(tmp_path) as site, site.channel(site.authority.identity(Role.DEVICE, name="cam-1")) as channel:
        response = await GRPCInferenceServiceStub(channel).ModelInfer(protobuf_body.encode_request(request_of()))
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    assert (response.model_name, health.status) == ("digits", health_pb2.HealthCheckResponse.SERVING)


@on_the_agents_loop
async def test_a_renewed_identity_counts_from_the_next_connection_on(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        before = site.client()
        assert (await site.ask(before))[0] == 200

        site.authority = FleetAuthority()
        site.follow(site.authority.identity(Role.AGENT, name=AGENT))
        after = site.client()
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    if (await site.ask(after))[0] == 200:
                        break
                except ssl.SSLError:
                    await asyncio.sleep(0.01)
            with pytest.raises(ssl.SSLError):
                await site.ask(before)
        async with site.channel(site.authority.identity(Role.DEVICE)) as channel:
            await GRPCInferenceServiceStub(channel).ModelInfer(protobuf_body.encode_request(request_of()))


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://example.org"],
        [f"spiffe://{DOMAIN}/device/cam-1", f"spiffe://{DOMAIN}/device/cam-2"],
        ["spiffe://other.test/device/cam-1"],
        [f"spiffe://{DOMAIN}/controller/main"],
        [f"spiffe://{DOMAIN}/device/"],
        [f"spiffe://{DOMAIN}/device/.."],
    ],
)
@on_the_agents_loop
async def test_only_one_name_of_a_device_or_application_is_a_caller(tmp_path: Path, uris: list[str]) -> None:
    async with running(tmp_path) as site:
        assert site.tls.caller_of([f"spiffe://{DOMAIN}/device/cam-1"]) == "cam-1"
        with pytest.raises(Untrusted):
            site.tls.caller_of(uris)
