"""A fleet's authority, and what peers of every role prove their identity with."""

from datetime import UTC, datetime

from controller.identity.authority import CertificateAuthority, key_pem, new_key, public_key_of
from core.grpc_transport import TlsIdentity
from core.spiffe import Peer, Role

DOMAIN = "fleet.test"


class FleetAuthority:
    """Certifies whoever is named; each certificate is for a key of its own."""

    def __init__(self) -> None:
        self._authority = CertificateAuthority.make(trust_domain=DOMAIN, now=datetime.now(UTC))

    def identity(self, role: Role, *, name: str = "main") -> TlsIdentity:
        key = new_key()
        public = public_key_of(key.public_key())
        certificate = self._authority.issue(Peer(DOMAIN, role, name), public, now=datetime.now(UTC))
        return TlsIdentity(certificate.pem, key_pem(key), self._authority.certificate_pem)
