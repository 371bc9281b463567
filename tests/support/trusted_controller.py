"""A controller's two gRPC ports over real TLS on loopback, with its identity, and devices that dial them."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controller.api.agents_grpc import FleetServicer
from controller.api.artifacts_grpc import ArtifactServicer
from controller.api.enrolment_grpc import EnrolmentServer, EnrolmentServicer
from controller.api.policy import PolicyInterceptor, require_own_name
from controller.fleet.service import Fleet
from controller.identity.authority import CertificateAuthority, key_pem, new_key
from controller.identity.keys import AuthorityKeys
from controller.identity.renewal import signed_message
from controller.identity.service import Identity
from core.addresses import Address
from core.clock import SystemClock
from core.digest import Digest
from core.errors import NotFound
from core.fleet_state import AgentHello
from core.grpc_server_credentials import mutual_tls, one_sided_tls
from core.grpc_transport import MUTUAL_TLS_OPTIONS, SERVER_OPTIONS, TlsIdentity, open_channel
from core.ids import AgentId
from core.open_inference.grpc_face import OpenInferenceServicer, add_open_inference
from protos.artifacts.v1.artifacts_pb2_grpc import add_ArtifactServiceServicer_to_server
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub, add_FleetServiceServicer_to_server
from protos.identity.v1 import identity_pb2 as pb
from protos.identity.v1.identity_pb2_grpc import EnrolmentServiceStub
from tests.support.echo_plane import EchoPlane
from tests.support.fake_agent import FakeAgent
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import NORTH, FakeCatalogue, made_hello
from tests.support.identity_store import MemoryIdentityStore
from tests.support.releases import OpenCatalogue, UnsigningDirector

HOST = Address("127.0.0.1", 0)
DOMAIN = "fleet.test"
ROOT = b'{"signed": {"_type": "root"}}'
TIMEOUT_S = 10.0
_STREAM_STARTS = 4
_LOST_BY_GRPC = {grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED}


class ShiftedClock:
    """The system's clock, moved: TLS itself looks at the real time."""

    def __init__(self) -> None:
        self._shift = timedelta()

    def now(self) -> datetime:
        return datetime.now(UTC) + self._shift

    def monotonic_s(self) -> float:
        return SystemClock().monotonic_s()

    def shift(self, by: timedelta) -> None:
        """Stand `by` away from the real time."""
        self._shift = by


class Root:
    async def trust_root(self, sha256: bytes = b"") -> bytes:
        if sha256 not in (b"", hashlib.sha256(ROOT).digest()):
            raise NotFound("no such root")
        return ROOT


class NoBlobs:
    async def size(self, digest: Digest) -> int:
        raise NotFound("no blobs here")

    async def open_range(self, digest: Digest, offset: int = 0) -> AsyncGenerator[bytes, None]:
        if await self.size(digest):
            yield b""


def made_csr(key: ec.EllipticCurvePrivateKey, *names: x509.GeneralName) -> bytes:
    """Return a request for `key`, which may ask for names that it has no right to."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@dataclass
class Device:
    """A device that has enrolled: its key and what it got for it."""

    key: ec.EllipticCurvePrivateKey
    credential: pb.Credential

    @property
    def name(self) -> AgentId:
        return AgentId(self.credential.agent_id)

    @property
    def tls(self) -> TlsIdentity:
        return TlsIdentity(self.credential.certificate_chain, key_pem(self.key), self.credential.trust_bundle)

    def cloned(self) -> "Device":
        return Device(self.key, self.credential)

    def hello(self, *, boot_id: str = "boot-1") -> AgentHello:
        return made_hello(self.name, boot_id=boot_id)


class TrustedController:
    def __init__(self, identity: Identity, keys: AuthorityKeys, clock: ShiftedClock, *, patience_s: float) -> None:
        self.identity = identity
        self._keys = keys
        self._patience_s = patience_s
        self.clock = clock
        self.fleet = Fleet(MemoryFleetStore(), FakeCatalogue(), releases=OpenCatalogue(), clock=clock, max_sessions=100)
        identity.on_revoked(self.fleet.expel)
        self._main = grpc.aio.server(interceptors=[PolicyInterceptor(identity)], options=SERVER_OPTIONS)
        port = self._main.add_secure_port(str(HOST), mutual_tls(identity.server_identity))
        self.main_address = Address(HOST.host, port)
        self.enrolment = EnrolmentServer(HOST, one_sided_tls(identity.server_identity), connection_age_s=4 * patience_s)

    async def start(self) -> None:
        fleet = FleetServicer(
            self.fleet,
            UnsigningDirector(),
            check_hello=require_own_name(self.identity),
            trust_bundle=self.identity.trust_bundle,
            hello_timeout_s=self._patience_s,
        )
        add_FleetServiceServicer_to_server(fleet, self._main)
        add_ArtifactServiceServicer_to_server(ArtifactServicer(NoBlobs()), self._main)
        inference = OpenInferenceServicer(EchoPlane(), server_name="test", server_version="1", clock=self.clock)
        add_open_inference(inference, self._main)
        await self._main.start()
        await self.enrolment.start(
            EnrolmentServicer(self.identity, Root(), clock=self.clock, read_timeout_s=self._patience_s)
        )

    def stolen_authority(self) -> CertificateAuthority:
        """Return what a thief of the controller's disk has."""
        authority = self.identity.authorities()[0]
        return CertificateAuthority.load(authority.certificate.encode(), self._keys.load(authority.sha256))

    async def stop(self) -> None:
        self.fleet.end_sessions()
        await self._main.stop(None)
        await self.enrolment.stop()

    # ---- enrolling --------------------------------------------------------------------------------------------

    async def token(self, agent: AgentId | None = None, *, lifetime: timedelta = timedelta(hours=1)) -> bytes:
        made = await self.identity.create_token(NORTH, created_by="ada", agent=agent, lifetime=lifetime)
        return made.secret

    @asynccontextmanager
    async def enrolment_stub(self) -> AsyncIterator[Any]:
        """Yield a stub of the enrolment port, on a connection of its own."""
        credentials = grpc.ssl_channel_credentials(self.identity.trust_bundle())
        options = [*MUTUAL_TLS_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(str(self.enrolment.address), credentials, options=options) as channel:
            yield EnrolmentServiceStub(channel)

    async def enrol(
        self, secret: bytes, *, wanted_id: str = "", key: ec.EllipticCurvePrivateKey | None = None
    ) -> Device:
        key = key or new_key()
        request = pb.EnrolRequest(secret=secret, csr=made_csr(key), wanted_id=wanted_id)
        async with self.enrolment_stub() as stub:
            return Device(key, await stub.Enrol(request, timeout=TIMEOUT_S))

    async def enrolled(self, name: str = "cam-1") -> Device:
        return await self.enrol(await self.token(AgentId(name)))

    async def renew(self, device: Device, *, key: ec.EllipticCurvePrivateKey | None = None) -> Device:
        """Return the device after a renewal; `device` itself is as if the reply was lost."""
        key = key or new_key()
        csr = made_csr(key)
        async with self.enrolment_stub() as stub:
            challenge = await stub.Challenge(pb.ChallengeRequest(agent_id=device.name), timeout=TIMEOUT_S)
            signature = device.key.sign(signed_message(challenge.nonce, csr), ec.ECDSA(hashes.SHA256()))
            request = pb.RenewRequest(agent_id=device.name, nonce=challenge.nonce, csr=csr, signature=signature)
            return Device(key, await stub.Renew(request, timeout=TIMEOUT_S))

    # ---- the main port ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def channel(self, tls: TlsIdentity) -> AsyncIterator[grpc.aio.Channel]:
        """Yield a connection of its own, as of another machine."""
        channel = open_channel(self.main_address, tls)
        try:
            yield channel
        finally:
            await channel.close()

    @asynccontextmanager
    async def dial(self, device: Device) -> AsyncIterator[FakeAgent]:
        """Open a device's stream; leaving the block cuts it."""
        async with self.channel(device.tls) as channel:
            call = FleetServiceStub(channel).Session()
            try:
                yield FakeAgent(call)
            finally:
                call.cancel()

    async def refusal(self, device: Device, *, hello: AgentHello | None = None) -> tuple[grpc.StatusCode, str]:
        """Say hello; return how the controller refuses.

        On a busy machine gRPC itself ends one start of a stream in a hundred, in words of its own; agents try again.
        """
        for _ in range(_STREAM_STARTS):
            async with self.dial(device) as agent:
                # The stream's end says why.
                with suppress(AssertionError, grpc.aio.AioRpcError):
                    await agent.hello(hello or device.hello())
                code, reason = await agent.end()
            if code not in _LOST_BY_GRPC:
                break
        return code, reason

    async def is_served(self, device: Device, *, boot_id: str = "boot-1") -> bool:
        """Say hello; True when Welcome comes."""
        async with self.dial(device) as agent:
            await agent.hello(device.hello(boot_id=boot_id))
        return True


@asynccontextmanager
async def trusted_controller(folder: Path, *, patience_s: float = 5.0) -> AsyncIterator[TrustedController]:
    """Yield a controller that waits `patience_s` for a peer that should say something."""
    clock = ShiftedClock()
    keys = AuthorityKeys(folder / "keys")
    identity = Identity(MemoryIdentityStore(), keys, clock=clock, trust_domain=DOMAIN)
    await identity.prepare()
    controller = TrustedController(identity, keys, clock, patience_s=patience_s)
    await controller.start()
    try:
        yield controller
    finally:
        await controller.stop()
