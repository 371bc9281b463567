"""The Open Inference Protocol as routes of the agent's HTTP face, over its data plane.

Inference costs no task: the body is decoded, the plane admits the request and gives a future, whose callback writes the
answer. Everything else is awaited in `core.open_inference.http_face`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from opentelemetry.trace import SpanKind

from core.errors import InternalError, NanofleetError
from core.open_inference import http_face, http_form
from core.open_inference.http_face import HttpFace
from core.open_inference.http_paths import ENDPOINTS, Operation, Target, target_of
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest
from core.open_inference.service import Statistics
from core.span_log import Attribute
from edge_agent.answer import Answer as Answered
from edge_agent.answer import tagged
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.http.messages import Answer, Cancel, Methods, Request, Respond, Route
from edge_agent.front.http.routes import Tasks
from edge_agent.terms import terms_of

# Chosen: the last paths asked for, so that they are taken apart once; peers choose the names in them.
_MAX_REMEMBERED = 256


class _HttpCall:
    """A request over HTTP, as its span tells it."""

    operation = "infer"
    span_kind = SpanKind.SERVER

    def __init__(self, route: str) -> None:
        self._attributes: Mapping[str, Attribute] = {"http.request.method": "POST", "http.route": route}

    def span_attributes(self) -> Mapping[str, Attribute]:
        return self._attributes


class OpenInferenceRoutes:
    """`find` a path; None: no path of the protocol."""

    def __init__(
        self,
        plane: EdgeDataPlane,
        *,
        server_name: str,
        server_version: str,
        extensions: Sequence[str],
        tasks: Tasks,
        statistics: Statistics | None = None,
        limits: BodyLimits = DEFAULT_LIMITS,
    ) -> None:
        self._plane = plane
        self._face = HttpFace(
            plane,
            server_name=server_name,
            server_version=server_version,
            extensions=extensions,
            statistics=statistics,
        )
        self._tasks = tasks
        self._limits = limits
        self._calls = {path: _HttpCall(path) for path in ENDPOINTS[Operation.INFER].paths}
        self._remembered: dict[str, Methods] = {}

    def find(self, path: str) -> Methods | None:
        found = self._remembered.get(path)
        if found is None:
            target = target_of(path)
            if target is None:
                return None
            found = self._methods_of(target)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[path] = found
        return found

    def _methods_of(self, target: Target) -> Methods:
        method = ENDPOINTS[target.operation].method
        if target.operation is Operation.INFER:
            serve = partial(self._infer, target, self._calls[target.template])
            return {method: Route(target.template, serve, http_form.refusal, self._limits.max_body_bytes)}

        async def answer(request: Request) -> Answer:
            return await self._face.answer(target, request.body)

        serve_awaited = self._tasks.serve(answer, http_form.refusal)
        max_body_bytes = http_face.MAX_BODY_BYTES if method == "POST" else 0
        return {method: Route(target.template, serve_awaited, http_form.refusal, max_body_bytes)}

    def _infer(self, target: Target, origin: _HttpCall, request: Request, respond: Respond) -> Cancel:
        message = http_form.decode_infer(
            request.headers, request.body, model=target.model, version=target.version, limits=self._limits
        )
        call = http_form.call_of(request.headers, message, arrived_s=request.arrived_s, client=request.client)
        terms = terms_of(message.parameters, client=request.client)
        future = self._plane.ask(message, call, terms, origin=origin)
        future.add_done_callback(partial(_settle, message, respond))
        return future.cancel


def _settle(message: InferRequest, respond: Respond, future: "asyncio.Future[Answered]") -> None:
    if future.cancelled():
        return
    failure = future.exception()
    if isinstance(failure, NanofleetError):
        respond(http_form.refusal(failure))
        return
    try:
        respond(http_form.encode_infer(message, tagged(future.result())))
    except NanofleetError as refused:
        respond(http_form.refusal(refused))
    except Exception as defect:
        respond(http_form.refusal(InternalError(f"no answer: {type(defect).__name__}")))
        raise
