"""Request bodies, read with a bound as they stream: what a client announces is a hint, what arrives is counted.

A compressed body is inflated into what is left of the same bound (`core.content_encoding`).
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from core.content_encoding import ENCODINGS, Decoder, decoder_of


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Return the whole body, decoded.

    Raises:
        HTTPException: 413, it has more than `max_bytes`, on the wire or inflated; 415, it is compressed in a way that
            we do not read.
        InvalidRequest: it is not what its Content-Encoding says.
    """
    decoder = _decoder(request.headers.get("content-encoding", "identity"))
    body = bytearray()
    async for block in bounded(request, max_bytes=max_bytes).stream():
        body += decoder.feed(block, room_bytes=max_bytes - len(body))
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    decoder.finish()
    return bytes(body)


def bounded(request: Request, *, max_bytes: int) -> Request:
    """Return the request with a body that raises HTTPException 413 where it passes `max_bytes`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    size_bytes = 0

    async def receive() -> Message:
        nonlocal size_bytes
        message = await request.receive()
        size_bytes += len(message.get("body", b""))
        if size_bytes > max_bytes:
            raise _too_large(max_bytes)
        return message

    return Request(request.scope, receive)


class BoundedRoute(APIRoute):
    """An endpoint whose body is JSON of at most MAX_BODY_BYTES."""

    # A publish request that names thousands of files stays far below it.
    MAX_BODY_BYTES = 1 << 20

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(bounded(request, max_bytes=self.MAX_BODY_BYTES))

        return handle_bounded


def _decoder(encoding: str) -> Decoder:
    decoder = decoder_of(encoding)
    if decoder is None:
        raise HTTPException(415, f"Content-Encoding: expected {ENCODINGS}, got {encoding.strip()[:40]!r}")
    return decoder


def _too_large(max_bytes: int) -> HTTPException:
    # The framework lets only its own exception pass through the reading of a body.
    return HTTPException(413, f"body: expected at most {max_bytes} bytes, got more; send less at a time")
