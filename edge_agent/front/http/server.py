"""Listens for HTTP, and holds what all its connections share: bounds, deadlines, who may ask, what is counted.

Without TLS it is for this machine only, and Host must name this machine, so that no web page reaches the face under a
name of its own ("DNS rebinding"). With TLS every peer shows a certificate of the fleet, which says who it is.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import TypeAlias

from core.addresses import Address, is_loopback
from core.clock import Clock
from core.errors import NanofleetError, Unavailable
from core.metrics import CALL_BUCKETS_S, Histogram, Registry
from edge_agent.front.http.connection import HttpConnection
from edge_agent.front.http.messages import HttpLimits, Methods
from edge_agent.front.http.reading import Read
from edge_agent.front.tls import FacesTls

_log = logging.getLogger(__name__)

# Chosen: how late a deadline may be noticed, as a share of the shortest of them.
_LOOK_RATIO = 0.2
_BACKLOG = 128
_STOP_LOOK_S = 0.02

Routing: TypeAlias = Callable[[str], Methods | None]


class HttpFront:
    """Serves what `routing` finds, by path, between `start` and `stop`."""

    def __init__(
        self,
        bind: Address,
        routing: Routing,
        *,
        clock: Clock,
        tls: FacesTls | None = None,
        limits: HttpLimits | None = None,
        metrics: Registry | None = None,
    ) -> None:
        self.limits = limits or HttpLimits()
        self.methods_of = routing
        self.now_s = clock.monotonic_s
        self._bind = bind
        self._tls = tls
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._renewing: set[asyncio.Task[None]] = set()
        self._connections: set[HttpConnection] = set()
        self.held_bytes = 0
        self.is_stopping = False
        self._looking: asyncio.TimerHandle | None = None
        self._look_interval_s = _LOOK_RATIO * min(
            self.limits.head_timeout_s, self.limits.body_timeout_s, self.limits.write_timeout_s
        )
        self._durations = (metrics or Registry()).histogram(
            "http_server_request_duration_seconds",
            "From the head of a request to its answer.",
            ("http_request_method", "http_route", "http_response_status_code"),
            bounds=CALL_BUCKETS_S,
        )
        self._instruments: dict[tuple[str, str, int], Histogram] = {}

    async def start(self) -> Address:
        """Listen; return the address, whose port the system chose if the setting says 0.

        Raises:
            Unavailable: the address is taken.
        """
        try:
            self._socket = socket.create_server(
                (self._bind.host, self._bind.port),
                family=socket.AF_INET6 if ":" in self._bind.host else socket.AF_INET,
                backlog=_BACKLOG,
            )
        except OSError as error:
            raise Unavailable(f"HTTP face: cannot listen on {self._bind}; choose another http_bind") from error
        self._socket.setblocking(False)
        await self._serve()
        if self._tls is not None:
            self._tls.on_change(self._follow)
        return Address(self._bind.host, self._socket.getsockname()[1])

    async def _serve(self) -> None:
        """Accept on the socket with what TLS needs now, and no more with what it needed before."""
        assert self._socket is not None
        context = None if self._tls is None else await self._tls.context()
        timeout_s = None if context is None else self.limits.head_timeout_s
        before = self._server
        self._server = await asyncio.get_running_loop().create_server(
            lambda: HttpConnection(self), sock=self._socket.dup(), ssl=context, ssl_handshake_timeout=timeout_s
        )
        if before is not None:
            before.close()

    def _follow(self) -> None:
        task = asyncio.get_running_loop().create_task(self._renew(), name="http certificate")
        self._renewing.add(task)
        task.add_done_callback(self._renewing.discard)

    async def _renew(self) -> None:
        try:
            if not self.is_stopping:
                await self._serve()
        except (NanofleetError, OSError) as error:
            # What was shown before is good for as long again: certificates are renewed at half of their life.
            _log.error("the HTTP face keeps its certificate of before", extra={"reason": str(error)})

    async def stop(self, grace_s: float = 0.0) -> None:
        """Listen no more, give requests under way `grace_s` seconds, and cut what is open then."""
        self.is_stopping = True
        if self._server is not None:
            self._server.close()
        if self._socket is not None:
            self._socket.close()
        give_up_s = self.now_s() + grace_s
        for connection in tuple(self._connections):
            if connection.is_idle:
                connection.close()
        while self._connections and self.now_s() < give_up_s:  # noqa: ASYNC110  (an event would cost every request)
            await asyncio.sleep(_STOP_LOOK_S)
        for connection in tuple(self._connections):
            connection.abort()
        if self._looking is not None:
            self._looking.cancel()
        # What was aborted is told so in the next turn.
        await asyncio.sleep(0)

    # ---- for connections ---------------------------------------------------------------------------------------

    def admit(self, connection: HttpConnection) -> bool:
        if len(self._connections) >= self.limits.connections:
            return False
        self._connections.add(connection)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(self._look_interval_s, self._look)
        return True

    def forget(self, connection: HttpConnection) -> None:
        self._connections.discard(connection)

    def caller(self, transport: asyncio.Transport) -> str:
        if self._tls is None:
            return ""
        certificate = transport.get_extra_info("peercert") or {}
        names = certificate.get("subjectAltName", ())
        return self._tls.caller_of([value for kind, value in names if kind == "URI"])

    def is_for_us(self, host: str) -> bool:
        if self._tls is not None:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
        return name.lower() == "localhost" or is_loopback(name.strip("[]"))

    def take(self, size_bytes: int) -> bool:
        if self.held_bytes + size_bytes > self.limits.held_bytes:
            return False
        self.held_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes

    def note(self, read: Read, status: int) -> None:
        key = (read.method if read.template else "_OTHER", read.template, status)
        found = self._instruments.get(key)
        if found is None:
            found = self._instruments[key] = self._durations.of(key[0], key[1], str(status))
        found.observe(self.now_s() - read.arrived_s)

    def _look(self) -> None:
        now_s = self.now_s()
        for connection in tuple(self._connections):
            connection.look(now_s)
        # No connection, no wake-ups.
        self._looking = None
        if self._connections:
            self._looking = asyncio.get_running_loop().call_later(self._look_interval_s, self._look)
