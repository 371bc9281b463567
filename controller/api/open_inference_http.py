"""The Open Inference Protocol over HTTP: plain Starlette routes over any `DataPlane`.

    /v2/health/{live,ready} · /v2 · /v2/models/{m}[/versions/{v}][/ready|/infer] · /v2/repository/index

A request is read with a bound, decoded by the codecs of `core.open_inference`, put to the data plane with its deadline
and trace, and encoded the way it asked for: JSON, or JSON followed by raw tensors ("binary tensor data" extension).
Statistics and loading are no part of it yet and answer 404, like every other path below /v2.

Source: https://github.com/kserve/open-inference-protocol (REST) and Triton's extension documents.
"""

from collections.abc import Mapping, Sequence

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from controller.api.http_bodies import read_body
from controller.api.problems import exception_handlers, open_inference_answer
from core.clock import Clock
from core.deadline import Deadline
from core.errors import InvalidRequest
from core.open_inference import binary_body, json_body
from core.open_inference.messages import (
    DEFAULT_LIMITS,
    BodyLimits,
    InferRequest,
    InferResponse,
    ModelMetadata,
    binary_outputs,
    timeout_s,
)
from core.open_inference.service import EXTENSIONS, Call, DataPlane
from core.telemetry import TRACEPARENT
from core.tensors import TensorSpec

HEADER_LENGTH = "inference-header-content-length"
JSON = "application/json"
BINARY = "application/octet-stream"
# No type at all is what many clients send, and the form type is curl's default; both mean JSON here, as in Triton.
_REQUEST_TYPES = frozenset({"", JSON, BINARY, "application/x-www-form-urlencoded"})
# The index request has one flag.
_MAX_INDEX_BODY_BYTES = 4096


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
    face = _Face(plane, server_name=server_name, server_version=server_version, clock=clock, limits=limits)
    of_model = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    return [
        Route("/v2/health/live", face.live),
        Route("/v2/health/ready", face.ready),
        Route("/v2", face.server_metadata),
        Route("/v2/", face.server_metadata),
        *(Route(path, face.model_metadata) for path in of_model),
        *(Route(f"{path}/ready", face.model_ready) for path in of_model),
        *(Route(f"{path}/infer", face.infer, methods=["POST"]) for path in of_model),
        Route("/v2/repository/index", face.index, methods=["POST"]),
    ]


class _Face:
    def __init__(
        self, plane: DataPlane, *, server_name: str, server_version: str, clock: Clock, limits: BodyLimits
    ) -> None:
        self._plane = plane
        self._server = {"name": server_name, "version": server_version, "extensions": EXTENSIONS}
        self._clock = clock
        self._limits = limits

    async def live(self, _request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _request: Request) -> Response:
        is_ready = await self._plane.is_ready()
        return _json({"live": True, "ready": is_ready}, 200 if is_ready else 503)

    async def server_metadata(self, _request: Request) -> Response:
        return _json(self._server)

    async def model_metadata(self, request: Request) -> Response:
        return _json(_metadata_body(await self._plane.metadata(*_model_of(request))))

    async def model_ready(self, request: Request) -> Response:
        """Clients look at the status only, so a model that is not ready must not answer 200."""
        model, version = _model_of(request)
        is_ready = await self._plane.is_model_ready(model, version)
        return _json({"name": model, "ready": is_ready}, 200 if is_ready else 503)

    async def index(self, request: Request) -> Response:
        only_ready = _only_ready(await read_body(request, max_bytes=_MAX_INDEX_BODY_BYTES))
        return _json(
            [
                {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
                for entry in await self._plane.index()
                if not only_ready or entry.state == "READY"
            ]
        )

    async def infer(self, request: Request) -> Response:
        arrived_s = self._clock.monotonic_s()
        message = await self._decode(request)
        response = await self._plane.infer(message, _call(request.headers, message, arrived_s))
        return _encode(message, response)

    async def _decode(self, request: Request) -> InferRequest:
        _require_type(request.headers)
        model, version = _model_of(request)
        body = await read_body(request, max_bytes=self._limits.max_body_bytes)
        header_length = request.headers.get(HEADER_LENGTH)
        if header_length is None:
            return json_body.decode_request(body, model_name=model, model_version=version, limits=self._limits)
        return binary_body.decode_request(
            body,
            header_length=_parsed_length(header_length),
            model_name=model,
            model_version=version,
            limits=self._limits,
        )


def _model_of(request: Request) -> tuple[str, str]:
    """Return model and version of the path; without a version the latest is meant."""
    return request.path_params["model"], request.path_params.get("version", "")


def _require_type(headers: Mapping[str, str]) -> None:
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in _REQUEST_TYPES:
        raise HTTPException(415, f"Content-Type: expected {JSON} or {BINARY}, got {content_type[:80]!r}")


def _parsed_length(text: str) -> int:
    # Nine digits are beyond every body that we take, and no text becomes a huge number.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidRequest(f"Inference-Header-Content-Length: expected a number of bytes, got {text[:40]!r}")
    return int(text)


def _call(headers: Mapping[str, str], message: InferRequest, arrived_s: float) -> Call:
    limit_s = timeout_s(message)
    return Call(
        deadline=None if limit_s is None else Deadline.after(limit_s, now_s=arrived_s),
        traceparent=headers.get(TRACEPARENT),
        tracestate=headers.get("tracestate"),
    )


def _encode(request: InferRequest, response: InferResponse) -> Response:
    binary = binary_outputs(request, response)
    if not binary:
        return Response(json_body.encode_response(response), media_type=JSON)
    body, header_length = binary_body.encode_response(response, binary=binary)
    return Response(body, headers={HEADER_LENGTH: str(header_length)}, media_type=BINARY)


def _only_ready(body: bytes) -> bool:
    try:
        asked = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"index: expected a JSON object or no body: {error}") from error
    if not isinstance(asked, dict) or not isinstance(asked.get("ready", False), bool):
        raise InvalidRequest('index: expected no body or a JSON object such as {"ready": true}')
    return bool(asked.get("ready", False))


def _metadata_body(metadata: ModelMetadata) -> dict[str, object]:
    return {
        "name": metadata.name,
        "versions": metadata.versions,
        "platform": metadata.platform,
        "inputs": _signature_body(metadata.inputs),
        "outputs": _signature_body(metadata.outputs),
        "properties": dict(metadata.properties),
    }


def _signature_body(specs: Sequence[TensorSpec]) -> list[dict[str, object]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type=JSON)
