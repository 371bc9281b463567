"""The fleet's certificate authority: P-256 throughout, one role and one name in each certificate.

What a certificate says is decided here and by the caller, never by the request: of a PKCS #10 request only the public
key and the proof of owning its private half are used (RFC 2986, section 3).
"""

import ipaddress
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.identity.model import LIFETIMES, Certificate, PublicKey
from core.errors import InvalidRequest
from core.spiffe import CONTROLLER_DNS_NAME, INTERNAL_DNS_DOMAIN, Peer, Role, agent_dns_name

# Chosen: rotation begins at half of it.
AUTHORITY_LIFETIME = timedelta(days=3650)
# A P-256 request without names has about 220 bytes; some tools add names and extensions.
MAX_CSR_BYTES = 4096
# Peers' clocks may be this far behind ours.
BACKDATED = timedelta(minutes=5)
# An agent whose clock starts in 1970 must reach the controller to be told so: what agents check is valid from then on.
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)

# RFC 1123, section 2.1, in lower case; what ends in digits is an address or nothing.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"(?:{_LABEL}\.)*(?![0-9]+\Z){_LABEL}")
_MAX_DNS_NAME_CHARS = 253

_HASH = hashes.SHA256()
# What the library raises for a request that is damaged or of a kind that it does not know.
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_CLIENT, _SERVER = [ExtendedKeyUsageOID.CLIENT_AUTH], [ExtendedKeyUsageOID.SERVER_AUTH]
# Agents have faces of their own too; whoever is not here is a client.
_USAGES = {Role.CONTROLLER: _SERVER, Role.BROKER: _SERVER, Role.AGENT: [*_CLIENT, *_SERVER]}
_SIGNS_HANDSHAKES = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


class CertificateAuthority:
    """A certificate and its private key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def make(cls, *, trust_domain: str, now: datetime) -> Self:
        """Make the authority of a trust domain, valid for AUTHORITY_LIFETIME."""
        key = new_key()
        # Two authorities live side by side while they rotate: their names must differ.
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"nanofleet authority {secrets.token_hex(8)}")])
        certificate = (
            x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(BEGINNING)
            .not_valid_after(now + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            # X509-SVID, section 4.2: a signing certificate names its trust domain, without a path.
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, _HASH)
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> Self:
        """Return the authority of a certificate and a key in PEM.

        Raises:
            ValueError: they are damaged, or do not belong together.
        """
        loaded = x509.load_pem_x509_certificate(certificate)
        private = serialization.load_pem_private_key(key, password=None)
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != loaded.public_key():
            raise ValueError("the private key is not that of the certificate")
        return cls(loaded, private)

    @property
    def trust_domain(self) -> str:
        """The domain whose certificates it signs; empty when it does not say."""
        try:
            extension = self._certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return ""
        uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
        return "".join(uris).removeprefix("spiffe://")

    @property
    def sha256(self) -> bytes:
        return self._certificate.fingerprint(_HASH)

    @property
    def certificate_pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return key_pem(self._key)

    @property
    def not_after(self) -> datetime:
        return self._certificate.not_valid_after_utc

    def issue(
        self, peer: Peer, key: PublicKey, *, now: datetime, common_name: str = "", hosts: Sequence[str] = ()
    ) -> Certificate:
        """Certify that `key` is the one of `peer`, for the time that its role gets.

        `common_name` is what a broker takes as the user name (`core.broker_names`); `hosts` are the machines whose
        names a server may show.

        Raises:
            InvalidRequest: a host is neither a DNS name that may be given away nor an address.
        """
        public = serialization.load_der_public_key(key.der)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        not_after = min(now + LIFETIMES[peer.role], self.not_after)
        builder = x509.CertificateBuilder(
            issuer_name=self._certificate.subject,
            subject_name=_subject(common_name),
            public_key=public,
            serial_number=x509.random_serial_number(),
            not_valid_before=BEGINNING if peer.role is Role.CONTROLLER else now - BACKDATED,
            not_valid_after=not_after,
        )
        for extension, is_critical in self._extensions(peer, hosts):
            builder = builder.add_extension(extension, critical=is_critical)
        made = builder.sign(self._key, _HASH)
        pem = made.public_bytes(serialization.Encoding.PEM)
        return Certificate(pem, f"{made.serial_number:x}", made.not_valid_after_utc)

    def _extensions(self, peer: Peer, hosts: Sequence[str]) -> list[tuple[x509.ExtensionType, bool]]:
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(peer)), *map(_host_name, hosts)]
        if peer.role is Role.CONTROLLER:
            names.append(x509.DNSName(CONTROLLER_DNS_NAME))
        if peer.role is Role.AGENT and (dns_name := agent_dns_name(peer.name)) is not None:
            names.append(x509.DNSName(dns_name))
        ours = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return [
            # RFC 5280, 4.1.2.6: critical, because the subject may be empty.
            (x509.SubjectAlternativeName(names), True),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_SIGNS_HANDSHAKES, True),
            (x509.ExtendedKeyUsage(_USAGES.get(peer.role, _CLIENT)), False),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ours), False),
        ]


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def _host_name(host: str) -> x509.GeneralName:
    """Return what a server's certificate says of `host`.

    Raises:
        InvalidRequest: it is no DNS name or address, has a wildcard, or is a name that says who the controller is.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = host.lower()
    if len(name) > _MAX_DNS_NAME_CHARS or _DNS_NAME.fullmatch(name) is None:
        raise InvalidRequest(f"host: expected the DNS name or address of one machine, got {host[:80]!r}")
    if f".{name}".endswith(f".{INTERNAL_DNS_DOMAIN}"):
        raise InvalidRequest(
            f"host: expected a name outside {INTERNAL_DNS_DOMAIN}, where the controller is, got {name}"
        )
    return x509.DNSName(name)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_key_of(key: ec.EllipticCurvePublicKey) -> PublicKey:
    return PublicKey(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def csr_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a PKCS #10 request for `key`; names are the certifier's choice, so it has none."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, _HASH)
    return request.public_bytes(serialization.Encoding.PEM).decode()


def checked_csr(csr: bytes) -> PublicKey:
    """Return the key that a PKCS #10 request in DER asks a certificate for; names in it are not looked at.

    Raises:
        InvalidRequest: it is no request, not for a P-256 key, or not signed by that key.
    """
    if not 0 < len(csr) <= MAX_CSR_BYTES:
        raise InvalidRequest(f"certificate request: expected 1 to {MAX_CSR_BYTES} bytes, got {len(csr)}")
    try:
        request = x509.load_der_x509_csr(csr)
        key, is_proven = request.public_key(), request.is_signature_valid
    except _UNREADABLE as error:
        raise InvalidRequest(
            "certificate request: expected PKCS #10 in DER for a P-256 key, got something else"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidRequest("certificate request: expected a P-256 key, got one of another kind")
    if not is_proven:
        raise InvalidRequest("certificate request: its signature is not by the key that it asks for")
    return public_key_of(key)


def csr_from_pem(text: str) -> bytes:
    """Return a PKCS #10 request in DER; `checked_csr` looks at what it says.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        return x509.load_pem_x509_csr(text.encode()).public_bytes(serialization.Encoding.DER)
    except _UNREADABLE as error:
        raise InvalidRequest("certificate request: expected PKCS #10 in PEM, got something else") from error


def is_signed_by(key: PublicKey, signature: bytes, message: bytes) -> bool:
    """Say whether `signature` is ECDSA with SHA-256 (DER) by `key` over `message`."""
    public = serialization.load_der_public_key(key.der)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    try:
        public.verify(signature, message, ec.ECDSA(_HASH))
    except InvalidSignature:
        return False
    return True
