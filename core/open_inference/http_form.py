"""Requests and replies of the Open Inference Protocol as they travel over HTTP, whatever server carries them.

    headers + body ──▶ decode_infer ──▶ plane ──▶ encode_infer ──▶ Reply
                                          └ error ─▶ refusal ────▶ Reply   {"error": text}

Bodies are JSON, or JSON followed by raw tensors ("binary tensor data" extension) when the header
Inference-Header-Content-Length says so. Names of headers are in lower case.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import orjson

from core.deadline import Deadline
from core.errors import InvalidRequest, NanofleetError, Overloaded
from core.open_inference import binary_body, json_body
from core.open_inference.messages import BodyLimits, InferRequest, InferResponse, binary_outputs, timeout_s
from core.open_inference.service import Call
from core.status import STATUS
from core.telemetry import TRACEPARENT

HEADER_LENGTH = "inference-header-content-length"
JSON = "application/json"
BINARY = "application/octet-stream"
# No type at all is what many clients send, and the form type is curl's default; both mean JSON here, as in Triton.
_REQUEST_TYPES = frozenset({"", JSON, BINARY, "application/x-www-form-urlencoded"})
# Chosen: a queue of inference requests drains in well under a second.
RETRY_AFTER_S = 1.0
_TRACESTATE = "tracestate"
# W3C Trace Context, section 3.3.1.5: at least 512 characters are to be handed on; more need not be.
MAX_TRACESTATE_CHARS = 512

Headers = Mapping[str, str]
_NO_HEADERS: Headers = MappingProxyType({})


class UnsupportedMediaType(InvalidRequest):
    """The body is of a type that nobody reads here: status 415, where HTTP has one of its own for it."""


class Reply(NamedTuple):
    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: Headers = _NO_HEADERS


def decode_infer(headers: Headers, body: bytes, *, model: str, version: str, limits: BodyLimits) -> InferRequest:
    """Return the request in a decoded body.

    Raises:
        UnsupportedMediaType: by its Content-Type it is something else.
        InvalidRequest: not a well-formed request.
        TooLarge: over one of the limits.
    """
    require_type(headers)
    header_length = headers.get(HEADER_LENGTH)
    if header_length is None:
        return json_body.decode_request(body, model_name=model, model_version=version, limits=limits)
    return binary_body.decode_request(
        body, header_length=_parsed_length(header_length), model_name=model, model_version=version, limits=limits
    )


def require_type(headers: Headers) -> None:
    content_type = headers.get("content-type", "")
    if content_type not in _REQUEST_TYPES:
        content_type = content_type.partition(";")[0].strip().lower()
        if content_type not in _REQUEST_TYPES:
            raise UnsupportedMediaType(f"Content-Type: expected {JSON} or {BINARY}, got {content_type[:80]!r}")


def call_of(headers: Headers, request: InferRequest, *, arrived_s: float, client: str = "") -> Call:
    """Return what travels beside a request that arrived at `arrived_s` of the monotonic clock.

    Raises:
        InvalidRequest: its timeout is none.
    """
    limit_s = timeout_s(request)
    tracestate = headers.get(_TRACESTATE)
    if tracestate is not None and len(tracestate) > MAX_TRACESTATE_CHARS:
        tracestate = None
    deadline = None if limit_s is None else Deadline.after(limit_s, now_s=arrived_s)
    return Call(deadline, headers.get(TRACEPARENT), tracestate, client)


def encode_infer(request: InferRequest, response: InferResponse) -> Reply:
    """Return the reply in the form that the request asked for."""
    binary = binary_outputs(request, response)
    if not binary:
        return Reply(json_body.encode_response(response))
    body, header_length = binary_body.encode_response(response, binary=binary)
    return Reply(body, content_type=BINARY, headers={HEADER_LENGTH: str(header_length)})


def json_reply(content: object, status: int = 200) -> Reply:
    return Reply(orjson.dumps(content), status)


def refusal(error: NanofleetError) -> Reply:
    status = 415 if isinstance(error, UnsupportedMediaType) else STATUS[error.code].http
    return Reply(orjson.dumps({"error": str(error)}), status, headers=retry_headers(error))


def retry_headers(error: NanofleetError) -> Headers:
    """Return the header that says when to try again, for errors that can tell; seconds are whole in HTTP."""
    wait_s = error.retry_after_s
    if wait_s is None and isinstance(error, Overloaded):
        wait_s = RETRY_AFTER_S
    return _NO_HEADERS if wait_s is None else {"retry-after": str(max(1, math.ceil(wait_s)))}


def _parsed_length(text: str) -> int:
    # Nine digits are beyond every body that we take, and no text becomes a huge number.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidRequest(f"Inference-Header-Content-Length: expected a number of bytes, got {text[:40]!r}")
    return int(text)
