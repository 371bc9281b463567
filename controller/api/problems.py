"""Errors as HTTP answers, in the shape of each face: `{"error": …}` for Open Inference, RFC 9457 for the operator.

    our error ──────────────┐                                   ┌─ open_inference_answer   {"error": text}
    the framework's 404/405 ┼──▶ (status, error) from one table ┤
    invalid JSON body ──────┘   (core.status)                   └─ problem_answer          application/problem+json

Whatever is none of these is a defect of ours: the client learns only that, the server's log has the rest.
"""

from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias

import orjson
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from controller.api.operator_views import ProblemView
from core.errors import InternalError, InvalidRequest, NanofleetError
from core.open_inference.http_form import retry_headers
from core.status import STATUS, error_from_http

PROBLEM_TYPE = "application/problem+json"
# Chosen: enough to correct a body in one go, and a hostile body cannot make a long answer.
_MAX_NAMED_FAULTS = 3
_MAX_FAULT_CHARS = 200

Headers: TypeAlias = Mapping[str, str]
Answer: TypeAlias = Callable[[int, NanofleetError, Headers], Response]
Handler: TypeAlias = Callable[[Request, Any], Coroutine[Any, Any, Response]]


def open_inference_answer(status: int, error: NanofleetError, headers: Headers) -> Response:
    return Response(orjson.dumps({"error": str(error)}), status, headers, "application/json")


def problem_answer(status: int, error: NanofleetError, headers: Headers) -> Response:
    view = ProblemView(
        type=f"urn:nanofleet:problem:{error.code}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=str(error),
        code=error.code,
    )
    return Response(orjson.dumps(view.model_dump()), status, headers, PROBLEM_TYPE)


def exception_handlers(answer: Answer) -> dict[int | type[Exception], Handler]:
    """Return the handlers that turn everything an endpoint may raise into answers of one shape."""

    async def of_ours(_request: Request, error: NanofleetError) -> Response:
        return answer(STATUS[error.code].http, error, retry_headers(error))

    async def of_framework(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path[:_MAX_FAULT_CHARS]}: {error.detail}"
        return answer(error.status_code, error_from_http(error.status_code, text), error.headers or {})

    async def of_validation(_request: Request, error: RequestValidationError) -> Response:
        refused = InvalidRequest(_faults(error))
        return answer(STATUS[refused.code].http, refused, {})

    async def of_disconnect(_request: Request, _error: Exception) -> Response:
        # Nobody reads it, but the framework wants an answer; without one it would log a defect.
        gone = InvalidRequest("the client went away before its body was complete")
        return answer(STATUS[gone.code].http, gone, {})

    async def of_defect(_request: Request, _error: Exception) -> Response:
        defect = InternalError("a defect of ours; the controller's log says more")
        return answer(STATUS[defect.code].http, defect, {})

    return {
        NanofleetError: of_ours,
        HTTPException: of_framework,
        RequestValidationError: of_validation,
        ClientDisconnect: of_disconnect,
        Exception: of_defect,
    }


def _faults(error: RequestValidationError) -> str:
    faults = error.errors()
    named = [f"{_location(fault['loc'])}: {fault['msg']}"[:_MAX_FAULT_CHARS] for fault in faults[:_MAX_NAMED_FAULTS]]
    more = len(faults) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more > 0 else "")


def _location(parts: tuple[int | str, ...]) -> str:
    return ".".join(map(str, parts)) or "request"
