"""Server-sent events: a page that is open learns that something changed, and asks for what it shows again.

    event: changed     data: {"fleet": 12, "traces": 7}     numbers that grow; at once, then at most once in TICK_S
    event: ended       data: why                            the session is over; nothing follows
    :                                                       every HEARTBEAT_S, so that nobody between us hangs up

What changed is not told: the page asks for it with its session like any other, so nothing is shown here that a page
would not show. Source: HTML Living Standard, section 9.2, "Server-sent events".
"""

import asyncio
from collections.abc import AsyncIterator, Callable

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from controller.access.service import Access
from controller.api.access import caller_of, source_of
from controller.api.access_cookies import session_token
from core.errors import InvalidRequest, Overloaded, Unauthenticated

# Chosen: several people with several pages open; each stream is a connection and a timer.
MAX_STREAMS = 128
TICK_S = 1.0
# Chosen: below the idle time-outs of common proxies; a session that ended is noticed within it.
HEARTBEAT_S = 15.0
RECONNECT_MS = 3000


class Events:
    """`fleet` and `traces` return numbers that grow with every change there."""

    def __init__(
        self,
        access: Access,
        *,
        fleet: Callable[[], int],
        traces: Callable[[], int],
        tick_s: float = TICK_S,
        heartbeat_s: float = HEARTBEAT_S,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self._access = access
        self._fleet = fleet
        self._traces = traces
        self._tick_s = tick_s
        self._heartbeat_s = heartbeat_s
        self._max_streams = max_streams
        self._open = 0
        self._ending = asyncio.Event()

    def end(self) -> None:
        """End every stream; browsers come back later by themselves."""
        self._ending.set()

    async def stream(self, request: Request) -> Response:
        """Answer with a stream that lives as long as the session.

        Raises:
            InvalidRequest: the caller has no browser session.
            Overloaded: too many streams are open.
        """
        token = session_token(request.scope)
        if caller_of(request).session is None or token is None:
            raise InvalidRequest("events: expected a browser session; programs ask GET /api/agents with wait_s")
        if self._open >= self._max_streams:
            raise Overloaded(f"events: expected at most {self._max_streams} streams; close some pages")
        messages = self._counted(self._messages(token, source_of(request.scope)))
        return StreamingResponse(messages, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _counted(self, messages: AsyncIterator[str]) -> AsyncIterator[str]:
        self._open += 1
        try:
            async for message in messages:
                yield message
        finally:
            self._open -= 1

    async def _messages(self, token: str, source: str) -> AsyncIterator[str]:
        yield f"retry: {RECONNECT_MS}\n\n"
        told, quiet_s = None, 0.0
        while not self._ending.is_set():
            if (now := (self._fleet(), self._traces())) != told:
                told = now
                yield _event("changed", orjson.dumps({"fleet": now[0], "traces": now[1]}).decode())
            if quiet_s >= self._heartbeat_s:
                quiet_s = 0.0
                if (reason := await self._end_of_session(token, source)) is not None:
                    yield _event("ended", reason)
                    return
                yield ":\n\n"
            await self._pause()
            quiet_s += self._tick_s

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._tick_s):
                await self._ending.wait()
        except TimeoutError:
            pass  # Time to look again.

    async def _end_of_session(self, token: str, source: str) -> str | None:
        """Return why the session is over; None: it is not. Being asked keeps it alive, as an open page should."""
        try:
            await self._access.resume(token, source=source)
        except Unauthenticated as error:
            return str(error)
        except Overloaded:
            return "session: too many unknown ones came from here; sign in again"
        return None


def _event(name: str, text: str) -> str:
    return f"event: {name}\ndata: {text}\n\n"
