"""What a connection hands to a route, and what it writes for its answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeAlias

from core.errors import NanofleetError
from core.open_inference.http_form import Reply, json_reply
from core.open_inference.http_paths import PREFIX

TEXT = "text/plain; charset=utf-8"
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a peer may send, hold and wait for; all figures chosen."""

    # A head of Prometheus has some 400 bytes, one with a bearer token 2 kB.
    head_bytes: int = 8192
    head_fields: int = 64
    # Silence between two requests, and before the first.
    idle_timeout_s: float = 75.0
    head_timeout_s: float = 5.0
    # The largest body in it is 2 Mbit/s.
    body_timeout_s: float = 60.0
    # Without taking any of an answer.
    write_timeout_s: float = 10.0
    connections: int = 128
    # Of bodies that are read or waited for, on all connections.
    held_bytes: int = 64 << 20


class Request(NamedTuple):
    """`path` is without the query; names of headers are lower case, of a repeated one the last counts.

    `body` is decoded, `arrived_s` the instant of the head on the monotonic clock. `client` is the name in the peer's
    certificate; empty where peers show none.
    """

    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""
    arrived_s: float = 0.0
    client: str = ""


Answer: TypeAlias = Reply
Respond: TypeAlias = Callable[[Answer], None]
# Gives up what a route does for a peer that has left.
Cancel: TypeAlias = Callable[[], object]
# Answers by `Respond`, at once or later, in the loop; or raises a NanofleetError at once.
Serve: TypeAlias = Callable[[Request, Respond], Cancel | None]


class Route(NamedTuple):
    """`template` names it to metrics; `max_body_bytes` 0: it takes no body. `refuse` writes errors in its words."""

    template: str
    serve: Serve
    refuse: Callable[[NanofleetError], Answer]
    max_body_bytes: int = 0


# By method, without HEAD, which is answered like GET.
Methods: TypeAlias = Mapping[str, Route]


class Site(Protocol):
    """What is served, to whom and within which bounds: what all connections share."""

    @property
    def limits(self) -> HttpLimits: ...
    def now_s(self) -> float: ...
    def is_for_us(self, host: str) -> bool:
        """Say whether `host`, as the header of that name has it, may be asked for here."""
        ...

    def methods_of(self, path: str) -> Methods | None:
        """Return what is served at `path`; None: nothing."""
        ...

    def take(self, size_bytes: int) -> bool:
        """Count what a body holds; False: there is no room."""
        ...

    def give_back(self, size_bytes: int) -> None: ...


def text_answer(text: str, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return Answer(f"{text}\n".encode(), status.value, TEXT)


def text_refusal(path: str, status: HTTPStatus, text: str, headers: Mapping[str, str] = _NO_HEADERS) -> Answer:
    """Return an answer that no route gives, in the shape that clients of `path` read."""
    if path.startswith(PREFIX):
        return json_reply({"error": text}, status.value)._replace(headers=headers)
    return text_answer(text, status)._replace(headers=headers)


def encoded(answer: Answer, *, closes: bool, keeps_old: bool, is_head: bool) -> bytes:
    """Return the bytes of an answer. `keeps_old`: a peer of HTTP/1.0 asked to keep the connection, and is told yes."""
    connection = "Connection: close\r\n" if closes else "Connection: keep-alive\r\n" if keeps_old else ""
    more = "".join([f"{name}: {value}\r\n" for name, value in answer.headers.items()]) if answer.headers else ""
    head = (
        f"{_STATUS_LINES[answer.status]}Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n"
        f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{more}{connection}\r\n"
    ).encode("latin-1")
    return head if is_head else head + answer.body


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
