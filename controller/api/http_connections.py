"""Connections of the HTTP port before anybody is known on them: how long each may take, and how many one peer may have.

    accepted ──▶ TLS handshake ──▶ head of a request ──▶ the gate knows who asks
                 HANDSHAKE_TIMEOUT_S     HEAD_TIMEOUT_S     (`controller.api.access`)

Behind the gate requests have bounds of their own. Between two requests uvicorn closes what stays idle.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# Chosen, as for the gRPC ports: slow mobile links have seconds.
HANDSHAKE_TIMEOUT_S = 20.0
# Chosen: a head is one packet or two; a browser that opens connections ahead of need opens them again.
HEAD_TIMEOUT_S = 20.0
# Chosen: a quarter of all, so that one machine that holds its connections leaves room for the others.
MAX_CONNECTIONS_PER_ADDRESS = 512


class BoundedConnection(HttpToolsProtocol):
    """One connection, which is closed when the head of a request takes too long."""

    head_timeout_s = HEAD_TIMEOUT_S
    max_per_address = MAX_CONNECTIONS_PER_ADDRESS

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the base class
        super().connection_made(transport)
        if self._has_too_many():
            transport.abort()
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn says that there is always a request; there is none before the first head.
        request: RequestResponseCycle | None = self.cycle
        if request is None or request.response_complete:
            self._expect_head()
        else:
            self._stop_expecting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def _has_too_many(self) -> bool:
        if self.client is None:
            return False
        host = self.client[0]
        others = [other.client for other in self.connections if isinstance(other, BoundedConnection)]
        return sum(client is not None and client[0] == host for client in others) > self.max_per_address

    def _expect_head(self) -> None:
        # It is not put off by single bytes of a head that never ends.
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _stop_expecting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
