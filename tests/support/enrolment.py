"""A controller's authority and its enrolment port, over real TLS on a free loopback port, and faults on demand."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from core.addresses import Address
from core.enrolment_token import EnrolmentToken
from core.grpc_transport import SERVER_OPTIONS, TlsIdentity
from core.ids import AgentId, SiteId
from core.spiffe import CONTROLLER_DNS_NAME
from edge_agent.identity.folder import Identity
from protos.identity.v1 import identity_pb2 as pb
from protos.identity.v1.identity_pb2_grpc import EnrolmentServiceServicer, add_EnrolmentServiceServicer_to_server

HOST = "127.0.0.1"
DOMAIN = "fleet.test"
ROOT = b'{"signed": {"_type": "root", "version": 1}}'
WEEK = timedelta(days=7)
SAMPLE_SECRET = bytes(range(32))
Key = ec.EllipticCurvePrivateKey
Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


def pem_of_key(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class FakeAuthority:
    """A certificate authority; `begins` is when it and what it certifies by default become valid."""

    def __init__(self, name: str = "fleet authority", *, begins: datetime | None = None) -> None:
        self.begins = begins or datetime.now(UTC) - timedelta(hours=1)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.certificate = self._built(self._name, self.key.public_key(), timedelta(days=3650), is_authority=True)
        self.pem = self.certificate.public_bytes(Encoding.PEM)

    @property
    def sha256(self) -> bytes:
        return self.certificate.fingerprint(hashes.SHA256())

    def controller(self, *, dns: str = CONTROLLER_DNS_NAME, begins: datetime | None = None) -> TlsIdentity:
        """Return a controller's key and certificate, and behind it the authority's, as it is presented."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.DNSName(dns),
            x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/controller/main"),
        ]
        leaf = self._built(x509.Name([]), key.public_key(), WEEK, names=names, begins=begins)
        return TlsIdentity(leaf.public_bytes(Encoding.PEM) + self.pem, pem_of_key(key), self.pem)

    def certified(
        self, key: ec.EllipticCurvePublicKey, agent: str, *, life: timedelta = WEEK, begins: datetime | None = None
    ) -> bytes:
        """Return an agent's certificate in PEM."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/agent/{agent}")]
        leaf = self._built(x509.Name([]), key, life, names=names, begins=begins)
        return leaf.public_bytes(Encoding.PEM)

    def _built(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        life: timedelta,
        *,
        names: list[x509.GeneralName] | None = None,
        is_authority: bool = False,
        begins: datetime | None = None,
    ) -> x509.Certificate:
        begins = begins or self.begins
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + life)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if names is not None:
            usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return builder.sign(self.key, hashes.SHA256())


@dataclass
class FakeEnrolment(EnrolmentServiceServicer):
    """Certifies whoever has a known secret, or proves to hold the key that was certified last."""

    authority: FakeAuthority
    secrets: set[bytes] = field(default_factory=lambda: {SAMPLE_SECRET})
    # What the next certificates are made with.
    life: timedelta = WEEK
    begins: datetime | None = None
    catalogue_root: bytes = ROOT
    trust_bundle: bytes = b""
    # Replies that are thrown away after the work was done.
    replies_to_lose: int = 0
    banned: bool = False
    # A key that was certified for another identity; in DER.
    refused_key: bytes = b""
    # Changes the credential before it is sent.
    spoil: Callable[[pb.Credential], None] | None = None
    requests: list[pb.EnrolRequest] = field(default_factory=list)
    renewals: list[pb.RenewRequest] = field(default_factory=list)
    last_key: ec.EllipticCurvePublicKey | None = None
    previous_key: ec.EllipticCurvePublicKey | None = None
    agent: str = "gate-1"
    renewed: asyncio.Event = field(default_factory=asyncio.Event)
    _nonces: set[bytes] = field(default_factory=set)

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.Credential:  # noqa: N802  # named by the protocol
        self.requests.append(request)
        if request.secret not in self.secrets:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "make another with `nanofleet devices token`")
        await self._check_key(request.csr, context)
        self.agent = request.wanted_id or self.agent
        self.last_key, self.previous_key = key_in(request.csr), None
        credential = self._credential()
        credential.catalogue_root = self.catalogue_root
        return await self._sent(credential, context)

    async def Challenge(self, request: pb.ChallengeRequest, context: Context) -> pb.ChallengeReply:  # noqa: N802  # named by the protocol
        nonce = os.urandom(32)
        self._nonces.add(nonce)
        return pb.ChallengeReply(nonce=nonce)

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.Credential:  # noqa: N802  # named by the protocol
        self.renewals.append(request)
        proven = self._proven(request)
        if self.banned or proven is None or request.nonce not in self._nonces:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "unknown, banned or too late")
        self._nonces.discard(request.nonce)
        await self._check_key(request.csr, context)
        self.previous_key, self.last_key = proven, key_in(request.csr)
        return await self._sent(self._credential(), context)

    async def _check_key(self, csr: bytes, context: Context) -> None:
        if public_bytes(key_in(csr)) == self.refused_key:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "its key was certified before")

    def _proven(self, request: pb.RenewRequest) -> ec.EllipticCurvePublicKey | None:
        statement = b"nanofleet renew v1\n" + request.nonce + hashlib.sha256(request.csr).digest()
        for key in (self.last_key, self.previous_key):
            try:
                if key is not None:
                    key.verify(request.signature, statement, ec.ECDSA(hashes.SHA256()))
                    return key
            except InvalidSignature:
                continue
        return None

    def _credential(self) -> pb.Credential:
        assert self.last_key is not None
        chain = self.authority.certified(self.last_key, self.agent, life=self.life, begins=self.begins)
        credential = pb.Credential(
            agent_id=self.agent,
            site="berlin",
            certificate_chain=chain,
            trust_bundle=self.trust_bundle or self.authority.pem,
        )
        if self.spoil is not None:
            self.spoil(credential)
        return credential

    async def _sent(self, credential: pb.Credential, context: Context) -> pb.Credential:
        if self.replies_to_lose:
            self.replies_to_lose -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the reply was lost")
        self.renewed.set()
        return credential

    def identity(
        self, enrolment: Address, *, controller: Address | None = None, life: timedelta | None = None
    ) -> Identity:
        """Return the identity of an agent that enrolled here; `enrolment` is where this is served."""
        key = ec.generate_private_key(ec.SECP256R1())
        self.last_key, self.previous_key = key.public_key(), None
        begins = self.begins or self.authority.begins
        chain = self.authority.certified(self.last_key, self.agent, life=life or self.life, begins=begins)
        return Identity(
            AgentId(self.agent),
            SiteId("berlin"),
            DOMAIN,
            controller or enrolment,
            enrolment,
            hashlib.sha256(ROOT).hexdigest(),
            begins.replace(microsecond=0),
            begins.replace(microsecond=0) + (life or self.life),
            TlsIdentity(chain, pem_of_key(key), self.authority.pem),
        )


def key_in(csr: bytes) -> ec.EllipticCurvePublicKey:
    request = x509.load_der_x509_csr(csr)
    assert request.is_signature_valid
    key = request.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def token_for(
    enrolment: Address, authority: FakeAuthority, *, secret: bytes = SAMPLE_SECRET, root: bytes = ROOT
) -> EnrolmentToken:
    return EnrolmentToken(secret, authority.sha256, hashlib.sha256(root).digest(), DOMAIN, enrolment, enrolment)


@asynccontextmanager
async def serving(
    service: FakeEnrolment, controller: TlsIdentity | None = None, *, port: int = 0
) -> AsyncIterator[Address]:
    """Yield where `service` is served by `controller` (None: one of its authority), showing its certificate only."""
    shown = controller or service.authority.controller()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_EnrolmentServiceServicer_to_server(service, server)
    credentials = grpc.ssl_server_credentials([(shown.private_key, shown.certificate_chain)])
    bound = server.add_secure_port(f"{HOST}:{port}", credentials)
    await server.start()
    try:
        yield Address(HOST, bound)
    finally:
        await server.stop(None)
