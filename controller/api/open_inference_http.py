"""The Open Inference Protocol over HTTP: Starlette routes in front of the face that `core.open_inference` has.

A request is read with a bound, decoded, put to the data plane with its deadline and trace, and encoded the way it asked
for. Statistics are not the gateway's and answer 404, like every other path below /v2.
"""

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from controller.api.http_bodies import read_body
from controller.api.problems import exception_handlers, open_inference_answer
from core.clock import Clock
from core.open_inference import http_form
from core.open_inference.http_face import MAX_BODY_BYTES, HttpFace
from core.open_inference.http_form import Reply, UnsupportedMediaType
from core.open_inference.http_paths import ENDPOINTS, Operation, Target
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits
from core.open_inference.service import EXTENSIONS, DataPlane


def create_open_inference_app(
    plane: DataPlane, *, server_name: str, server_version: str, clock: Clock, limits: BodyLimits = DEFAULT_LIMITS
) -> Starlette:
    """Return the face as an application of its own, whose every error has the protocol's shape."""
    app = Starlette(
        routes=routes(plane, server_name=server_name, server_version=server_version, clock=clock, limits=limits),
        exception_handlers=exception_handlers(open_inference_answer),
    )
    # A redirect would make a client send its body twice.
    app.router.redirect_slashes = False
    return app


def routes(
    plane: DataPlane, *, server_name: str, server_version: str, clock: Clock, limits: BodyLimits = DEFAULT_LIMITS
) -> list[Route]:
    face = HttpFace(plane, server_name=server_name, server_version=server_version, extensions=EXTENSIONS)
    infer = _infer(plane, clock, limits)
    return [
        Route(path, infer if operation is Operation.INFER else _ask(face, operation), methods=[endpoint.method])
        for operation, endpoint in ENDPOINTS.items()
        # The gateway counts requests in its metrics and nowhere else.
        if operation is not Operation.STATISTICS
        for path in endpoint.paths
    ]


def _ask(face: HttpFace, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    async def ask(request: Request) -> Response:
        body = await read_body(request, max_bytes=MAX_BODY_BYTES) if request.method == "POST" else b""
        return _response(await face.answer(Target(operation, "", *_model_of(request)), body))

    return ask


def _infer(plane: DataPlane, clock: Clock, limits: BodyLimits) -> Callable[[Request], Awaitable[Response]]:
    async def infer(request: Request) -> Response:
        arrived_s = clock.monotonic_s()
        _require_type(request)
        body = await read_body(request, max_bytes=limits.max_body_bytes)
        model, version = _model_of(request)
        message = http_form.decode_infer(request.headers, body, model=model, version=version, limits=limits)
        call = http_form.call_of(request.headers, message, arrived_s=arrived_s)
        return _response(http_form.encode_infer(message, await plane.infer(message, call)))

    return infer


def _require_type(request: Request) -> None:
    # Before a body of another type is read.
    try:
        http_form.require_type(request.headers)
    except UnsupportedMediaType as error:
        raise HTTPException(415, str(error)) from error


def _model_of(request: Request) -> tuple[str, str]:
    """Return model and version of the path; without a version the latest is meant."""
    return request.path_params.get("model", ""), request.path_params.get("version", "")


def _response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, headers=dict(reply.headers), media_type=reply.content_type)
