"""The replica's HTTP face: an Open Inference Protocol request in, a response or an error in the protocol's shape out.

Knows Starlette's Request and Response and nothing of Ray, so it is tested without either.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import orjson
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from controller.heavy import headers
from controller.heavy.grouping import Feed
from controller.heavy.model import Answer
from core.clock import Clock
from core.deadline import Deadline
from core.digest import Digest, parse_digest
from core.errors import (
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NanofleetError,
    NotFound,
    TooLarge,
    UnknownModel,
)
from core.manifest import Manifest
from core.open_inference import binary_body, json_body
from core.open_inference.messages import DEFAULT_LIMITS, InferRequest, InferResponse, binary_outputs
from core.open_inference.signature import ModelSignature
from core.status import STATUS
from core.telemetry import TRACEPARENT, Tracing, parent_context

_log = logging.getLogger(__name__)

_INFER_PATH = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_HEALTH_BODIES = {"/v2/health/live": b'{"live":true}', "/v2/health/ready": b'{"live":true,"ready":true}'}


@dataclass(frozen=True, slots=True)
class HeavyCall:
    """One decoded request and what travelled beside it."""

    request: InferRequest
    digest: Digest
    deadline: Deadline | None

    def require_fit(self, manifest: Manifest, signature: ModelSignature) -> None:
        """Raise unless the request names this model and fits it."""
        name, version = self.request.model_name, self.request.model_version
        if name != manifest.model or version not in ("", str(manifest.version)):
            raise UnknownModel(
                f"{self.digest} is version {manifest.version} of {manifest.model!r}, "
                f"the request names version {version or 'latest'} of {name[:80]!r}"
            )
        signature.require(self.request)

    def feed(self) -> Feed:
        return {tensor.name: tensor.array for tensor in self.request.inputs}


Infer = Callable[[HeavyCall], Awaitable[Answer]]


async def respond(request: Request, infer: Infer, *, tracing: Tracing, clock: Clock) -> Response:
    """Answer one HTTP request; every refusal has the protocol's shape and a status of core.status."""
    try:
        if request.method == "GET" and (body := _HEALTH_BODIES.get(request.url.path)) is not None:
            return Response(body, media_type="application/json")
        return await _infer(request, infer, tracing=tracing, clock=clock)
    except NanofleetError as error:
        return _refusal(error)
    # The root of a request: a defect of ours must still answer in the protocol's shape.
    except Exception:
        _log.exception("request failed")
        return _refusal(InternalError("the heavy tier failed on this request; its log says why"))


async def _infer(request: Request, infer: Infer, *, tracing: Tracing, clock: Clock) -> Response:
    if "origin" in request.headers:
        # Only browsers send it: a page must not reach the tier through the browser of somebody on this machine.
        raise Forbidden("Origin: expected a request of the gateway, got one of a web page")
    match = _INFER_PATH.fullmatch(request.url.path)
    if match is None or request.method != "POST":
        raise NotFound(f"expected POST /v2/models/{{model}}/infer, got {request.method} {request.url.path[:80]}")
    digest = parse_digest(request.headers.get(headers.MODEL_ID, ""))
    deadline = _deadline(request, clock)
    model, version = match["model"], match["version"] or ""
    body = await _read_body(request)
    span = _start_span(request, model, digest, tracing)
    try:
        call = HeavyCall(_decode(request, body, model, version), digest, deadline)
        if deadline is not None and deadline.remaining_s(clock.monotonic_s()) <= 0:
            raise DeadlineExceeded("the deadline passed before the request reached the model")
        answer = await _in_time(infer(call), deadline, clock)
        if span is not None:
            _note_run(span, answer, tracing)
        return _encode(call.request, answer)
    except NanofleetError as error:
        if span is not None:
            span.set_attribute("error.type", error.code.value)
            span.set_status(StatusCode.ERROR, str(error))
        raise
    finally:
        if span is not None:
            span.end()


async def _in_time(answering: Awaitable[Answer], deadline: Deadline | None, clock: Clock) -> Answer:
    """Wait no longer than the caller does, for a model that loads or for room in a batch."""
    bound = asyncio.timeout(None if deadline is None else deadline.remaining_s(clock.monotonic_s()))
    try:
        async with bound:
            return await answering
    except TimeoutError:
        if not bound.expired():
            raise
        raise DeadlineExceeded("the deadline passed before the model answered") from None


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > DEFAULT_LIMITS.max_body_bytes:
                raise TooLarge(f"expected a body of at most {DEFAULT_LIMITS.max_body_bytes} bytes, got more")
    except ClientDisconnect as error:
        raise InvalidRequest("the body ended early: the client has left") from error
    return bytes(body)


def _decode(request: Request, body: bytes, model: str, version: str) -> InferRequest:
    header_length = request.headers.get(headers.HEADER_LENGTH)
    if header_length is None:
        return json_body.decode_request(body, model_name=model, model_version=version)
    length = headers.parse_header_length(header_length)
    return binary_body.decode_request(body, header_length=length, model_name=model, model_version=version)


def _deadline(request: Request, clock: Clock) -> Deadline | None:
    text = request.headers.get(headers.DEADLINE_MS)
    if text is None:
        return None
    try:
        remaining_ms = float(text)
    except ValueError:
        remaining_ms = -1.0
    # The comparison also refuses NaN.
    if not 0 <= remaining_ms <= headers.MAX_DEADLINE_MS:
        raise InvalidRequest(f"expected {headers.DEADLINE_MS} from 0 to {headers.MAX_DEADLINE_MS}, got {text[:80]!r}")
    return Deadline.after(remaining_ms / 1000, now_s=clock.monotonic_s())


def _encode(request: InferRequest, answer: Answer) -> Response:
    response = InferResponse(request.model_name, answer.model_version, answer.outputs, id=request.id)
    binary = binary_outputs(request, response)
    if not binary:
        return Response(json_body.encode_response(response), media_type="application/json")
    body, header_length = binary_body.encode_response(response, binary=binary)
    fields = {headers.HEADER_LENGTH: str(header_length)}
    return Response(body, media_type="application/octet-stream", headers=fields)


def _refusal(error: NanofleetError) -> Response:
    body = orjson.dumps({"error": str(error)})
    return Response(body, status_code=STATUS[error.code].http, media_type="application/json")


# ---- spans ----------------------------------------------------------------------------------------------------------


def _start_span(request: Request, model: str, digest: Digest, tracing: Tracing) -> Span | None:
    traceparent = request.headers.get(TRACEPARENT)
    if not tracing.is_sampled(traceparent):
        return None
    return tracing.tracer.start_span(
        f"infer {model}",
        context=parent_context(traceparent),
        kind=SpanKind.SERVER,
        attributes={"nanofleet.tier": "heavy", "nanofleet.model.digest": digest},
    )


def _note_run(span: Span, answer: Answer, tracing: Tracing) -> None:
    compute = tracing.tracer.start_span(
        "compute",
        context=set_span_in_context(span),
        start_time=answer.started_ns,
        attributes={"nanofleet.tier": "heavy", "nanofleet.batch": answer.batch},
    )
    compute.end(answer.ended_ns)
