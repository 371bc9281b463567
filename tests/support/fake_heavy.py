"""A server of the Open Inference Protocol that stands in for the heavy tier, and misbehaves on request."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

from aiohttp import web
from multidict import CIMultiDictProxy

from core.open_inference import binary_body
from core.open_inference.messages import InferResponse
from core.tensors import Datatype, Tensor

Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]
HEADER_LENGTH = "inference-header-content-length"


async def scale(request: web.Request) -> web.StreamResponse:
    """Answer `y = 3 x` as raw bytes."""
    asked = binary_body.decode_request(
        await request.read(),
        header_length=int(request.headers[HEADER_LENGTH]),
        model_name=request.match_info["model"],
        model_version=request.match_info["version"],
    )
    y = Tensor("y", Datatype.FP32, asked.inputs[0].array * 3)
    response = InferResponse(asked.model_name, asked.model_version, (y,), id=asked.id)
    body, length = binary_body.encode_response(response, binary={"y"})
    return web.Response(body=body, headers={HEADER_LENGTH: str(length)})


def answer(status: int, text: str, kind: str = "text/plain") -> Behaviour:
    """Return a behaviour that always says the same."""

    async def behave(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text, content_type=kind)

    return behave


async def reset(request: web.Request) -> web.StreamResponse:
    """Close the connection instead of answering."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


class FakeHeavy:
    """Use as an async context manager; `stop` and `start` take it away and bring it back on the same port."""

    def __init__(self) -> None:
        self.infer: Behaviour = scale
        self.ready: Behaviour = answer(200, '{"live":true,"ready":true}', "application/json")
        self.asked: list[CIMultiDictProxy[str]] = []
        self.probed = 0
        # Set once a caller has left before its answer.
        self.abandoned = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v2/models/{model}/versions/{version}/infer", self._infer)
        app.router.add_get("/v2/health/ready", self._ready)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def never(self, _: web.Request) -> web.StreamResponse:
        """A behaviour: accept, and say nothing until the caller leaves."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.abandoned.set()
            raise
        return web.Response()

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.headers)
        return await self.infer(request)

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        self.probed += 1
        return await self.ready(request)
