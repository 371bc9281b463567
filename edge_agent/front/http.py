"""The local HTTP face: small answers for programs on the same machine, such as Prometheus. HTTP/1.1, GET only.

    accepted ─▶ head, at most MAX_HEAD_BYTES within HEAD_TIMEOUT_S ─▶ route ─▶ answer within WRITE_TIMEOUT_S ─▶ closed

One request per connection: who asks every few seconds gains nothing from keeping one. Everything that a peer can make
this process hold or wait for is bounded here. Host must name this machine, so that no web page reaches the face under a
name of its own ("DNS rebinding"). Routes are made by the composition root. Source: RFC 9112.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from core.addresses import Address, is_loopback
from core.errors import Unavailable

_log = logging.getLogger(__name__)

# Chosen: a head of Prometheus has some 400 bytes.
MAX_HEAD_BYTES = 8192
HEAD_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 10.0
# Chosen: a handful of programs; what comes beyond is closed at once.
MAX_CONNECTIONS = 32

_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.[01]")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\x80-\xff\t]*)")
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Request:
    """`path` is without the query; names of headers are lower case, of a repeated one the last counts."""

    path: str
    query: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    content_type: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[Request], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class HttpLimits:
    head_bytes: int = MAX_HEAD_BYTES
    head_timeout_s: float = HEAD_TIMEOUT_S
    write_timeout_s: float = WRITE_TIMEOUT_S
    connections: int = MAX_CONNECTIONS


class HttpFront:
    """Serves `routes`, by path, between `start` and `stop`."""

    def __init__(self, bind: Address, routes: Mapping[str, Route], *, limits: HttpLimits | None = None) -> None:
        self._bind = bind
        self._routes = routes
        self._limits = limits or HttpLimits()
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> Address:
        """Listen; return the address, whose port the system chose if the setting says 0.

        Raises:
            Unavailable: the address is taken.
        """
        try:
            # The limit is what a reader holds; it stops reading at twice that.
            self._server = await asyncio.start_server(
                self._accept, self._bind.host, self._bind.port, limit=self._limits.head_bytes
            )
        except OSError as error:
            raise Unavailable(f"HTTP face: cannot listen on {self._bind}; choose another http_bind") from error
        return Address(self._bind.host, self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Listen no more and cut what is open."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._serving) >= self._limits.connections:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="http request")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer(reader)
            if answer is not None:
                async with asyncio.timeout(self._limits.write_timeout_s):
                    writer.write(_encoded(answer))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except (TimeoutError, OSError):
            _log.debug("an HTTP peer went away or takes too long")
        finally:
            # Harmless when it was closed in order.
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> Answer | None:
        """Return the answer to the request that comes; None when none came, which deserves none."""
        try:
            async with asyncio.timeout(self._limits.head_timeout_s):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            expected = f"expected a head of at most {self._limits.head_bytes} bytes, got more"
            return _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, expected)
        except TimeoutError:
            expected = f"expected the head of a request within {self._limits.head_timeout_s:g} s"
            return _refusal(HTTPStatus.REQUEST_TIMEOUT, expected)
        try:
            return await self._routed(head.decode("latin-1"))
        except Exception:
            _log.error("an HTTP request failed by a defect", exc_info=True)
            return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "a defect of ours; the agent's log says more")

    async def _routed(self, head: str) -> Answer:
        line, *fields = head[:-4].split("\r\n")
        matches = [_FIELD.fullmatch(each) for each in fields]
        asked = _REQUEST_LINE.fullmatch(line)
        if asked is None or None in matches:
            return _refusal(HTTPStatus.BAD_REQUEST, "expected a request of HTTP/1.1 (RFC 9112), got something else")
        headers = {match[1].lower(): match[2].strip() for match in matches if match is not None}
        method, (path, _, query) = asked[1], asked[2].partition("?")
        if not _is_this_machine(headers.get("host", "")):
            return _refusal(HTTPStatus.MISDIRECTED_REQUEST, "Host: expected localhost or a loopback address")
        route = self._routes.get(path)
        if route is None:
            return _refusal(HTTPStatus.NOT_FOUND, f"expected one of {', '.join(sorted(self._routes))}")
        if method != "GET":
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET", {"Allow": "GET"})
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            return _refusal(HTTPStatus.BAD_REQUEST, "expected no body with GET, got one")
        return await route(Request(path, query, headers))


def _is_this_machine(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    return name.lower() == "localhost" or is_loopback(name.strip("[]"))


def _refusal(status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(f"{text}\n".encode(), status=status, headers=headers or {})


def _encoded(answer: Answer) -> bytes:
    fields = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **answer.headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n{head}\r\n".encode("latin-1") + answer.body
