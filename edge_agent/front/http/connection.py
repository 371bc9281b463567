"""One connection of the HTTP face: requests are answered one at a time, in their order (RFC 9112, section 9.3.2).

    bytes ─▶ RequestReader ─▶ waiting ─▶ its route ─▶ answer written ─▶ the next

- What comes behind a request waits, and beyond a few the peer is not read from.
- A request that is refused while its body is on its way gets its answer at once; what still comes is thrown away.
- A peer that ends its side has left: its request is withdrawn.
- Deadlines are looked at from the server, now and then: no timer per request.
"""

import asyncio
import logging
import math
from typing import Protocol, cast

from core.errors import NanofleetError
from core.logs import withheld
from edge_agent.front.http.messages import Answer, Cancel, Site, encoded
from edge_agent.front.http.reading import Read, RequestReader, defect_answer

_log = logging.getLogger(__name__)

# Chosen: what is read ahead of its answer, before the peer is not read from.
_READ_AHEAD = 8
# Chosen: of a refused request's body, so that who sends first and reads then sees why.
_MAX_DISCARDED_BYTES = 1 << 20
# Chosen: within which such a peer reads its answer and closes.
_LINGER_S = 2.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Server(Site, Protocol):
    """What a connection needs of `server.HttpFront`."""

    @property
    def is_stopping(self) -> bool:
        """Whether every answer is the last of its connection."""
        ...

    def admit(self, connection: "HttpConnection") -> bool:
        """Say whether there is room for it."""
        ...

    def forget(self, connection: "HttpConnection") -> None: ...
    def caller(self, transport: asyncio.Transport) -> str:
        """Return the name that the peer's certificate says; empty where peers show none.

        Raises:
            Untrusted: it may ask for nothing here.
        """
        ...

    def note(self, read: Read, status: int) -> None:
        """Count an answer."""
        ...


class _Exchange:
    """A request that is with its route."""

    __slots__ = ("_connection", "cancel", "read")

    def __init__(self, connection: "HttpConnection", read: Read) -> None:
        self._connection = connection
        self.read = read
        self.cancel: Cancel | None = None

    def respond(self, answer: Answer) -> None:
        self._connection.answer(self, answer)


class HttpConnection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._reader: RequestReader | None = None
        self._current: _Exchange | None = None
        self._is_advancing = False
        self._is_ending = False
        self._is_reading = True
        self._is_writable = True
        self._discarded_bytes = 0
        self._write_due_s = math.inf

    # ---- asyncio.Protocol --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The transports of uvloop are none to isinstance.
        self._transport = transport = cast("asyncio.Transport", transport)
        if not self._server.admit(self):
            transport.abort()
            return
        try:
            self._reader = RequestReader(self._server, client=self._server.caller(transport))
        except NanofleetError as error:
            self._reader = RequestReader(self._server, forbidden=error)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:
            return
        if reader.is_done:
            self._discard(len(data))
            return
        reader.feed(data)
        self._advance()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._is_writable = False
        self._write_due_s = self._server.now_s() + self._server.limits.write_timeout_s

    def resume_writing(self) -> None:
        self._is_writable = True
        if not self._is_ending:
            self._write_due_s = math.inf
            self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_ending = True
        self._server.forget(self)
        current, self._current = self._current, None
        if current is not None:
            self._server.give_back(current.read.held_bytes)
            if current.cancel is not None:
                current.cancel()
        if self._reader is not None:
            self._reader.close()

    # ---- for the server ----------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing is asked of it now."""
        return self._reader is None or not (self._current or self._reader.reads or self._reader.is_reading)

    def look(self, now_s: float) -> None:
        """Do what is due by `now_s`."""
        reader = self._reader
        if now_s >= self._write_due_s:
            _log.debug("an HTTP peer takes its answer too slowly")
            self.abort()
        elif reader is not None and now_s >= reader.due_s:
            if self.is_idle:
                self.close()
            elif reader.is_reading:
                reader.run_out_of_time()
                self._advance()

    def close(self) -> None:
        """Close once what was written is with the peer."""
        self._is_ending = True
        self._write_due_s = self._server.now_s() + self._server.limits.write_timeout_s
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- answering ---------------------------------------------------------------------------------------------

    def answer(self, exchange: _Exchange, answer: Answer) -> None:
        if self._current is not exchange:
            # The peer has left, or it was answered.
            return
        self._current = None
        self._write(exchange.read, answer)
        self._advance()

    def _advance(self) -> None:
        """Hand the next request to its route, as long as there is one and the peer takes answers."""
        reader = self._reader
        if self._is_advancing or reader is None:
            return
        self._is_advancing = True
        try:
            while reader.reads and self._current is None and self._is_writable and not self._is_ending:
                self._start(reader.reads.popleft())
        finally:
            self._is_advancing = False
        if reader.owes_continue and self._current is None and not self._is_ending:
            reader.owes_continue = False
            assert self._transport is not None
            self._transport.write(_CONTINUE)
        self._pace(reader)

    def _start(self, read: Read) -> None:
        if read.refusal is not None:
            self._write(read, read.refusal)
            return
        assert read.route is not None
        assert read.request is not None
        exchange = self._current = _Exchange(self, read)
        try:
            exchange.cancel = read.route.serve(read.request, exchange.respond)
        except NanofleetError as error:
            exchange.respond(read.route.refuse(error))
        except Exception as error:
            _log.error("an HTTP request failed by a defect", exc_info=withheld(error))
            exchange.respond(defect_answer(read.route))

    def _write(self, read: Read, answer: Answer) -> None:
        transport, server = self._transport, self._server
        assert transport is not None
        server.give_back(read.held_bytes)
        server.note(read, answer.status)
        closes = read.is_last or server.is_stopping
        transport.write(
            encoded(answer, closes=closes, keeps_old=read.is_old and not closes, is_head=read.method == "HEAD")
        )
        if closes:
            self._end(is_read=read.refusal is None)

    def _end(self, *, is_read: bool) -> None:
        """Close, but not in the face of a peer that still sends: a reset would take the answer from it."""
        self._is_ending = True
        transport, server = self._transport, self._server
        assert transport is not None
        if is_read or not transport.can_write_eof():
            self.close()
            return
        transport.write_eof()
        self._resume_reading()
        self._write_due_s = server.now_s() + min(_LINGER_S, server.limits.write_timeout_s)

    def _discard(self, size_bytes: int) -> None:
        self._discarded_bytes += size_bytes
        if self._discarded_bytes > _MAX_DISCARDED_BYTES:
            self.abort()

    def _pace(self, reader: RequestReader) -> None:
        """Read from the peer only while few of its requests wait."""
        assert self._transport is not None
        if self._is_ending:
            return
        is_behind = len(reader.reads) >= _READ_AHEAD or not self._is_writable
        if is_behind and self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()
        elif not is_behind:
            self._resume_reading()

    def _resume_reading(self) -> None:
        if not self._is_reading:
            assert self._transport is not None
            self._is_reading = True
            self._transport.resume_reading()
