"""`GET /metrics` for Prometheus, and the duration of every HTTP request by its route.

A viewer's secret opens it: `authorization: {credentials_file: …}` in Prometheus' scrape configuration. The route of a
request is the path of its rule in `access_rules`, so that what peers make up becomes no label.
"""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.api.access_rules import route_of
from core.clock import Clock
from core.exposition import exposed
from core.metrics import CALL_BUCKETS_S, Registry

PATH = "/metrics"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"})


def metrics_router(registry: Registry) -> APIRouter:
    """Return the endpoint that shows `registry`."""

    async def metrics(request: Request) -> Response:
        exposition = await exposed(registry, accept=request.headers.get("accept", ""))
        return Response(exposition.body, headers={"content-type": exposition.content_type})

    router = APIRouter(include_in_schema=False)
    router.add_api_route(PATH, metrics, methods=["GET"], response_model=None)
    return router


class Measured:
    """`http.server.request.duration` of the conventions, around `app`."""

    def __init__(self, app: ASGIApp, registry: Registry, *, clock: Clock) -> None:
        self._app = app
        self._clock = clock
        self._durations = registry.histogram(
            "http_server_request_duration_seconds",
            "From the head of a request to the end of its answer.",
            ("http_request_method", "http_route", "http_response_status_code"),
            bounds=CALL_BUCKETS_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = self._clock.monotonic_s()
        # What the server answers when the application does not.
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._note(scope, status, self._clock.monotonic_s() - started_s)

    def _note(self, scope: Scope, status: int, duration_s: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        self._durations.of(method, route_of(scope["path"]), str(status)).observe(duration_s)
