"""The one HTTP port, in clear or over TLS, served by uvicorn in the loop of the controller.

What a request says about where it came from (`X-Forwarded-…`) is not believed.
"""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from controller.api.http_connections import HANDSHAKE_TIMEOUT_S, BoundedConnection
from controller.api.http_tls import ServerCertificate
from core.addresses import Address
from core.errors import Unavailable

# Requests in progress may finish within it; long polls do not get more.
STOP_GRACE_S = 2
# Chosen: more connections than that at a time get 503.
MAX_CONNECTIONS = 2048


class HttpServer:
    """Bound when made, so that a port in use is known before anything else starts; serves while `run` runs."""

    def __init__(self, bind: Address, *, certificate: ServerCertificate | None = None) -> None:
        """Bind; without a certificate the port speaks in clear, which only a loopback address should."""
        family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
        try:
            self._socket = socket.create_server((bind.host, bind.port), family=family)
        except OSError as error:
            raise Unavailable(
                f"http_bind: cannot listen on {bind} ({error.strerror}); "
                "stop what listens there, or set http_bind to another port"
            ) from error
        self.address = Address(bind.host, self._socket.getsockname()[1])
        self._certificate = certificate
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self._certificate is None else 'https'}://{self.address}"

    async def run(self, app: ASGIApp) -> None:
        """Serve `app` until `stop`; connections still open STOP_GRACE_S later are cut."""
        certificate = self._certificate
        config = uvicorn.Config(
            app,
            http=BoundedConnection,
            ssl_context_factory=None if certificate is None else lambda _config, _default: certificate.context,
            proxy_headers=False,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
        self._server = _Server(config)
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        self._socket.close()


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen as the base class does, which has no bound of its own for handshakes that never end."""
        config = self.config
        self.servers = []
        for each in sockets or ():
            server = await asyncio.get_running_loop().create_server(
                self._connection,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if config.ssl else None,
            )
            self.servers.append(server)
        self.started = True

    def _connection(self) -> asyncio.Protocol:
        return BoundedConnection(self.config, self.server_state, app_state=self.lifespan.state)

    @contextmanager
    def capture_signals(self) -> Iterator[Any]:
        """Leave signals to the composition root."""
        yield
