"""Bytes of one connection → requests, each checked, bounded and with its route; or an answer that refuses it.

    bytes ─▶ httptools ─▶ head: checks, route ─▶ body: decoded, counted ─▶ Read(request)
                                └────────────────────┴─ no ─▶ Read(refusal), and nothing is read any more

Refused are both lengths at once (Content-Length and Transfer-Encoding), repeated ones, folded headers and whatever else
the parser is strict about: nobody in front of this face shall understand a request in another way than it does.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple, NoReturn

import httptools

from core.content_encoding import ENCODINGS, Decoder, decoder_of
from core.errors import InternalError, NanofleetError, TooLarge, Unavailable
from core.logs import withheld
from edge_agent.front.http.messages import Answer, Request, Route, Site, text_refusal

_log = logging.getLogger(__name__)

# Chosen: one block of bytes may hold thousands of small requests.
MAX_WAITING = 128
_NOT_HTTP = "expected a request of HTTP/1.1 (RFC 9112), got something else"
_VERSIONS = ("1.1", "1.0")


class Read(NamedTuple):
    """What came of reading one request: it, or the answer that refuses it.

    `is_last`: nothing is read behind it. `is_old`: by HTTP/1.0. `held_bytes` are to be given back once it is answered.
    """

    method: str
    template: str
    arrived_s: float
    held_bytes: int
    is_last: bool
    is_old: bool
    route: Route | None
    request: Request | None = None
    refusal: Answer | None = None


class _Refused(Exception):
    """Ends the parsing: the answer is known."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class _Incoming:
    """A request while it is read."""

    __slots__ = ("blocks", "body_bytes", "decoder", "fields", "head_bytes", "headers", "held_bytes", "method", "path",
                 "query", "route", "started_s", "url")  # fmt: skip

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.url = b""
        self.head_bytes = self.fields = self.body_bytes = self.held_bytes = 0
        self.headers: dict[str, str] = {}
        self.blocks: list[bytes] = []
        self.decoder: Decoder | None = None
        self.method = self.path = self.query = ""
        self.route: Route | None = None


class RequestReader:
    """Feed it; what it has read is in `reads`. `forbidden` is what every request of this peer is told."""

    def __init__(self, site: Site, *, client: str = "", forbidden: NanofleetError | None = None) -> None:
        self._site = site
        self._limits = site.limits
        self._client = client
        self._forbidden = forbidden
        self._parser = httptools.HttpRequestParser(self)
        self._incoming: _Incoming | None = None
        self._known_host = ""
        # Since the parser said something: what it keeps of a field, or skips.
        self._quiet_bytes = 0
        self.reads: deque[Read] = deque()
        # Nothing is read any more: the last request has come, or one was refused.
        self.is_done = False
        # The request that is being read waits to be told that its body is welcome.
        self.owes_continue = False
        self.due_s = site.now_s() + self._limits.idle_timeout_s

    @property
    def is_reading(self) -> bool:
        """Whether a request has begun and is not here as a whole."""
        return self._incoming is not None

    def feed(self, data: bytes) -> None:
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request that asked for it was the last.
            self._end()
        except httptools.HttpParserError as error:
            self._on_error(error)
        if not self.is_done and self._incoming is not None and self._quiet_bytes > self._limits.head_bytes:
            self._refuse_by(self._head_too_large())

    def run_out_of_time(self) -> None:
        """Refuse the request that has not come as a whole."""
        incoming = self._incoming
        path, part = ("", "head") if incoming is None or incoming.route is None else (incoming.path, "body")
        limit_s = self._limits.head_timeout_s if part == "head" else self._limits.body_timeout_s
        text = f"expected the {part} of a request within {limit_s:g} s"
        self._refuse_by(text_refusal(path, HTTPStatus.REQUEST_TIMEOUT, text))

    def close(self) -> None:
        """Read no more and give back what is held."""
        self._end()
        while self.reads:
            self._site.give_back(self.reads.popleft().held_bytes)

    # ---- what the parser calls ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        now_s = self._site.now_s()
        self._incoming = _Incoming(now_s)
        self.due_s = now_s + self._limits.head_timeout_s
        self._quiet_bytes = 0
        if len(self.reads) >= MAX_WAITING:
            text = f"expected at most {MAX_WAITING} requests ahead of their answers"
            raise _Refused(text_refusal("", HTTPStatus.TOO_MANY_REQUESTS, text, {"retry-after": "1"}))

    def on_url(self, url: bytes) -> None:
        incoming = self._known()
        incoming.url += url
        self._count_head(incoming, len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        incoming = self._known()
        incoming.fields += 1
        self._count_head(incoming, len(name) + len(value) + 4)
        if incoming.fields > self._limits.head_fields:
            raise _Refused(self._head_too_large())
        key = name.decode("latin-1").lower()
        if key == "host" and key in incoming.headers:
            _refuse(incoming, HTTPStatus.BAD_REQUEST, "Host: expected it once")
        # What follows a chunked body is none of the head.
        if incoming.route is None:
            incoming.headers[key] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        incoming = self._known()
        self._quiet_bytes = 0
        self.due_s = self._site.now_s() + self._limits.body_timeout_s
        self._check_head(incoming)
        self._expect_body(incoming, self._routed(incoming))

    def on_body(self, block: bytes) -> None:
        incoming = self._known()
        assert incoming.route is not None
        self._quiet_bytes = 0
        limit_bytes = incoming.route.max_body_bytes
        if incoming.decoder is not None:
            try:
                block = incoming.decoder.feed(block, room_bytes=limit_bytes - incoming.body_bytes)
            except NanofleetError as error:
                raise _Refused(incoming.route.refuse(error)) from error
        incoming.body_bytes += len(block)
        if incoming.body_bytes > limit_bytes:
            raise _Refused(_too_large(incoming.route))
        if not self._site.take(len(block)):
            crowded = Unavailable("too many bodies are on their way; try again").after(1.0)
            raise _Refused(incoming.route.refuse(crowded))
        incoming.held_bytes += len(block)
        incoming.blocks.append(block)

    def on_chunk_header(self) -> None:
        self._quiet_bytes = 0

    def on_message_complete(self) -> None:
        incoming = self._known()
        assert incoming.route is not None
        if incoming.decoder is not None:
            try:
                incoming.decoder.finish()
            except NanofleetError as error:
                raise _Refused(incoming.route.refuse(error)) from error
        blocks = incoming.blocks
        body = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        request = Request(
            incoming.path, incoming.query, incoming.headers, body, incoming.started_s, client=self._client
        )
        # What it would be upgraded to is not spoken here; the request itself is answered.
        is_last = not self._parser.should_keep_alive() or self._parser.should_upgrade()
        self._add(incoming, is_last=is_last, request=request)
        self.due_s = self._site.now_s() + self._limits.idle_timeout_s

    # ---- what is checked ---------------------------------------------------------------------------------------

    def _known(self) -> _Incoming:
        assert self._incoming is not None
        return self._incoming

    def _count_head(self, incoming: _Incoming, size_bytes: int) -> None:
        incoming.head_bytes += size_bytes
        if incoming.head_bytes > self._limits.head_bytes:
            raise _Refused(self._head_too_large())

    def _head_too_large(self) -> Answer:
        limits = self._limits
        text = f"expected a head of at most {limits.head_bytes} bytes and {limits.head_fields} fields, got more"
        return text_refusal("", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text)

    def _check_head(self, incoming: _Incoming) -> None:
        incoming.method = self._parser.get_method().decode("latin-1")
        path, _, incoming.query = incoming.url.decode("latin-1").partition("?")
        version = self._parser.get_http_version()
        if not path.startswith("/") or version not in _VERSIONS:
            _refuse(incoming, HTTPStatus.BAD_REQUEST, _NOT_HTTP)
        incoming.path = path
        headers = incoming.headers
        if "transfer-encoding" in headers and ("content-length" in headers or version == "1.0"):
            _refuse(incoming, HTTPStatus.BAD_REQUEST, "expected Content-Length or, with HTTP/1.1, Transfer-Encoding")
        host = headers.get("host", "")
        if host != self._known_host or not host:
            if not self._site.is_for_us(host):
                text = "Host: expected localhost or a loopback address"
                _refuse(incoming, HTTPStatus.MISDIRECTED_REQUEST, text)
            self._known_host = host

    def _routed(self, incoming: _Incoming) -> Route:
        methods = self._site.methods_of(incoming.path)
        if methods is None:
            _refuse(incoming, HTTPStatus.NOT_FOUND, f"{incoming.path[:200]}: nothing is served there")
        route = methods.get("GET" if incoming.method == "HEAD" else incoming.method)
        if route is None:
            allowed = ", ".join(sorted({*methods, *(("HEAD",) if "GET" in methods else ())}))
            _refuse(incoming, HTTPStatus.METHOD_NOT_ALLOWED, f"expected {allowed}", {"allow": allowed})
        incoming.route = route
        if self._forbidden is not None:
            raise _Refused(route.refuse(self._forbidden))
        return route

    def _expect_body(self, incoming: _Incoming, route: Route) -> None:
        headers = incoming.headers
        length = headers.get("content-length", "0")
        has_body = "transfer-encoding" in headers or length.strip("0") != ""
        if not has_body:
            return
        if not route.max_body_bytes:
            _refuse(incoming, HTTPStatus.BAD_REQUEST, f"expected no body with {incoming.method}, got one")
        if len(length) > 18 or int(length) > route.max_body_bytes:
            raise _Refused(_too_large(route))
        encoding = headers.get("content-encoding")
        if encoding is not None:
            incoming.decoder = decoder_of(encoding)
            if incoming.decoder is None:
                text = f"Content-Encoding: expected {ENCODINGS}, got {encoding[:40]!r}"
                _refuse(incoming, HTTPStatus.UNSUPPORTED_MEDIA_TYPE, text)
        expected = headers.get("expect")
        if expected is not None:
            if expected.lower() != "100-continue":
                _refuse(incoming, HTTPStatus.EXPECTATION_FAILED, "Expect: expected 100-continue")
            self.owes_continue = True

    # ---- how a request ends ------------------------------------------------------------------------------------

    def _on_error(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if self.is_done:
            # What comes behind the last request.
            return
        if isinstance(cause, _Refused):
            self._refuse_by(cause.answer)
        elif isinstance(error, httptools.HttpParserCallbackError):
            _log.error("an HTTP request failed by a defect", exc_info=withheld(cause or error))
            self._refuse_by(defect_answer(None if self._incoming is None else self._incoming.route))
        else:
            self._refuse_by(text_refusal("", HTTPStatus.BAD_REQUEST, _NOT_HTTP))

    def _refuse_by(self, answer: Answer) -> None:
        incoming = self._incoming or _Incoming(self._site.now_s())
        self._add(incoming, is_last=True, refusal=answer)

    def _add(
        self, incoming: _Incoming, *, is_last: bool, request: Request | None = None, refusal: Answer | None = None
    ) -> None:
        route = incoming.route
        self.reads.append(
            Read(
                incoming.method,
                "" if route is None else route.template,
                incoming.started_s,
                incoming.held_bytes,
                is_last,
                self._parser.get_http_version() == "1.0",
                route,
                request,
                refusal,
            )
        )
        # Its bytes are those of the answer's side from here on.
        incoming.held_bytes = 0
        self._incoming = None
        self.owes_continue = False
        if is_last:
            self._end()

    def _end(self) -> None:
        self.is_done = True
        self.due_s = math.inf
        if self._incoming is not None:
            self._site.give_back(self._incoming.held_bytes)
            self._incoming = None
        self.owes_continue = False


def defect_answer(route: Route | None) -> Answer:
    error = InternalError("a defect of ours; the agent's log says more")
    if route is not None:
        return route.refuse(error)
    return text_refusal("", HTTPStatus.INTERNAL_SERVER_ERROR, str(error))


def _refuse(incoming: _Incoming, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> NoReturn:
    raise _Refused(text_refusal(incoming.path, status, text, headers or {}))


def _too_large(route: Route) -> Answer:
    return route.refuse(TooLarge(f"body: expected at most {route.max_body_bytes} bytes, got more; send less at a time"))
