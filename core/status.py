"""The one table from our error codes to the status of each protocol, and back.

Open Inference Protocol: 400, 404, 413, 429, 503, 504 over HTTP and the matching gRPC codes. Every status stands for one
code only, so that an error means the same after any number of tiers. Therefore TOO_LARGE is not gRPC's
RESOURCE_EXHAUSTED, which says "later" and is OVERLOADED, but OUT_OF_RANGE, which says "never".
"""

from typing import NamedTuple

import grpc

from core import errors
from core.errors import ErrorCode, NanofleetError


class Status(NamedTuple):
    grpc: grpc.StatusCode
    http: int


STATUS: dict[ErrorCode, Status] = {
    ErrorCode.INVALID_REQUEST: Status(grpc.StatusCode.INVALID_ARGUMENT, 400),
    ErrorCode.UNAUTHENTICATED: Status(grpc.StatusCode.UNAUTHENTICATED, 401),
    ErrorCode.FORBIDDEN: Status(grpc.StatusCode.PERMISSION_DENIED, 403),
    ErrorCode.NOT_FOUND: Status(grpc.StatusCode.NOT_FOUND, 404),
    ErrorCode.CONFLICT: Status(grpc.StatusCode.ALREADY_EXISTS, 409),
    ErrorCode.TOO_LARGE: Status(grpc.StatusCode.OUT_OF_RANGE, 413),
    ErrorCode.OVERLOADED: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    ErrorCode.INTERNAL: Status(grpc.StatusCode.INTERNAL, 500),
    ErrorCode.INTEGRITY: Status(grpc.StatusCode.DATA_LOSS, 502),
    ErrorCode.UNAVAILABLE: Status(grpc.StatusCode.UNAVAILABLE, 503),
    ErrorCode.DISK_FULL: Status(grpc.StatusCode.FAILED_PRECONDITION, 507),
    ErrorCode.DEADLINE_EXCEEDED: Status(grpc.StatusCode.DEADLINE_EXCEEDED, 504),
}

# The narrowest class that a bare code can stand for when an error arrives from a peer.
_CLASS_OF_CODE: dict[ErrorCode, type[NanofleetError]] = {
    ErrorCode.INVALID_REQUEST: errors.InvalidRequest,
    ErrorCode.UNAUTHENTICATED: errors.Unauthenticated,
    ErrorCode.FORBIDDEN: errors.Forbidden,
    ErrorCode.NOT_FOUND: errors.NotFound,
    ErrorCode.CONFLICT: errors.Conflict,
    ErrorCode.TOO_LARGE: errors.TooLarge,
    ErrorCode.OVERLOADED: errors.Overloaded,
    ErrorCode.INTERNAL: errors.InternalError,
    ErrorCode.INTEGRITY: errors.IntegrityError,
    ErrorCode.UNAVAILABLE: errors.Unavailable,
    ErrorCode.DISK_FULL: errors.DiskFull,
    ErrorCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
}
# Statuses that only others send, where the default would mislead: trying again does not help.
_CODE_OF_GRPC = {
    grpc.StatusCode.UNIMPLEMENTED: ErrorCode.INVALID_REQUEST,
    grpc.StatusCode.UNKNOWN: ErrorCode.INTERNAL,
    **{status.grpc: code for code, status in STATUS.items()},
}
_CODE_OF_HTTP = {
    408: ErrorCode.DEADLINE_EXCEEDED,
    **{status.http: code for code, status in STATUS.items()},
}


def error_from_grpc(status: grpc.StatusCode, message: str) -> NanofleetError:
    """Return the error that a peer's gRPC status stands for; a status outside the table is UNAVAILABLE."""
    return _CLASS_OF_CODE[_CODE_OF_GRPC.get(status, ErrorCode.UNAVAILABLE)](message)


def error_from_http(status: int, message: str) -> NanofleetError:
    """Return the error of a peer's HTTP status; an unlisted 4xx is the request's fault, all else UNAVAILABLE."""
    fallback = ErrorCode.INVALID_REQUEST if 400 <= status < 500 else ErrorCode.UNAVAILABLE
    return _CLASS_OF_CODE[_CODE_OF_HTTP.get(status, fallback)](message)
