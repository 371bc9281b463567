"""TLS of the agent's own faces: what it shows, whom it believes, and who may ask.

The agent shows its own certificate, and its callers show theirs, by the fleet's authorities; both are what counts at
the moment of the handshake. Devices and applications may ask; a caller is known by the name in its certificate, of
which `caller_of` takes the SPIFFE id. A connection that stands is kept when certificates change: it was proven once.
"""

import asyncio
import ssl
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

import grpc

from core.errors import InvalidName, Untrusted
from core.grpc_server_credentials import mutual_tls
from core.grpc_transport import TlsIdentity
from core.spiffe import Role, parse_spiffe
from core.tls_files import server_context
from edge_agent.identity.folder import IdentityFolder

CALLERS = frozenset({Role.DEVICE, Role.APPLICATION})


class FacesTls:
    """`follow` is to be called with every identity that replaces the one before; `disk` reads the files."""

    def __init__(self, folder: IdentityFolder, identity: TlsIdentity, *, trust_domain: str, disk: Executor) -> None:
        self._folder = folder
        self._identity = identity
        self._trust_domain = trust_domain
        self._disk = disk
        self._observers: list[Callable[[], object]] = []

    def follow(self, identity: TlsIdentity) -> None:
        """Show `identity`, which is in the folder, from the next handshake on."""
        self._identity = identity
        for observer in self._observers:
            observer()

    def on_change(self, observer: Callable[[], object]) -> None:
        """Have `observer` called, in the loop, after each `follow`."""
        self._observers.append(observer)

    async def context(self) -> ssl.SSLContext:
        """Return what the handshakes from now on need.

        Raises:
            NotFound, Untrusted: the files of the identity cannot be used.
        """
        return await asyncio.get_running_loop().run_in_executor(self._disk, self._load)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return what gRPC needs, which asks for the present identity before each handshake."""
        return mutual_tls(lambda: self._identity)

    def caller_of(self, uris: Iterable[str]) -> str:
        """Return the name in a certificate whose URIs these are.

        Raises:
            Untrusted: it is of no device or application of this fleet.
        """
        try:
            peers = [parse_spiffe(uri) for uri in uris]
        except InvalidName as error:
            raise Untrusted(f"certificate: {error}") from error
        if len(peers) != 1 or peers[0].domain != self._trust_domain or peers[0].role not in CALLERS:
            raise Untrusted(
                f"certificate: expected one of a device or an application of {self._trust_domain}, "
                f"got {', '.join(map(str, peers))[:200] or 'no name'}"
            )
        return peers[0].name

    def _load(self) -> ssl.SSLContext:
        own = self._folder.files()
        return server_context(certificate=own.certificate, key=own.key, trust=own.trust)
