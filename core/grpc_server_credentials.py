"""A server's own TLS for gRPC, new for each handshake when it has changed: nothing restarts for a renewal.

gRPC asks on a thread of its own before every handshake, so what is asked must be a value that is replaced whole.
"""

from collections.abc import Callable
from typing import TypeAlias

import grpc

from core.grpc_transport import TlsIdentity

IdentitySource: TypeAlias = Callable[[], TlsIdentity]


def mutual_tls(identity: IdentitySource) -> grpc.ServerCredentials:
    """Return credentials for the port where every peer shows a certificate of the fleet's authorities."""
    return _credentials(_Current(identity, asks_for_certificates=True), is_mutual=True)


def one_sided_tls(identity: IdentitySource) -> grpc.ServerCredentials:
    """Return credentials for the port where agents without a certificate get theirs."""
    return _credentials(_Current(identity, asks_for_certificates=False), is_mutual=False)


class _Current:
    """What gRPC was given last."""

    def __init__(self, identity: IdentitySource, *, asks_for_certificates: bool) -> None:
        self._identity = identity
        self._asks_for_certificates = asks_for_certificates
        self._given = identity()

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        roots = self._given.trust_bundle if self._asks_for_certificates else None
        return grpc.ssl_server_certificate_configuration(
            [(self._given.private_key, self._given.certificate_chain)], root_certificates=roots
        )

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration; None when the last is still good."""
        if (identity := self._identity()) is self._given:
            return None
        self._given = identity
        return self.configuration()


def _credentials(current: _Current, *, is_mutual: bool) -> grpc.ServerCredentials:
    return grpc.dynamic_ssl_server_credentials(
        current.configuration(),
        current.fetch,  # type: ignore[arg-type]  # None means no change (gRPC documentation); the stubs do not know
        require_client_authentication=is_mutual,
    )
