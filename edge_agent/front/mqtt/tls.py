"""What the agent shows to a broker that asks for certificates: its own, as it is at that moment.

It is read anew for each connection, so a renewed certificate, and authorities that were rotated, count from the next
one on. A connection that stands is kept: brokers look at certificates during the handshake only.
"""

import asyncio
import ssl
from concurrent.futures import Executor
from pathlib import Path

from core.errors import NanofleetError, Unavailable
from core.tls_files import client_context
from edge_agent.identity.folder import IdentityFolder


class BrokerTls:
    """`ca_file` None: the fleet's authorities vouch for the broker too. `disk` reads the files."""

    def __init__(self, folder: IdentityFolder, server_name: str, *, ca_file: Path | None, disk: Executor) -> None:
        self.server_name = server_name
        self._folder = folder
        self._ca_file = ca_file
        self._disk = disk

    async def context(self) -> ssl.SSLContext:
        """Return what the next handshake needs.

        Raises:
            Unavailable: a file cannot be used; the next attempt may find it replaced.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, self._load)
        except NanofleetError as error:
            raise Unavailable(str(error)) from error

    def _load(self) -> ssl.SSLContext:
        own = self._folder.files()
        return client_context(certificate=own.certificate, key=own.key, trust=self._ca_file or own.trust)
