"""Every error that nanofleet raises on purpose.

    NanofleetError
    ├── InvalidRequest            the caller must change the request
    │   ├── InvalidName           a name outside the alphabet of core.ids
    │   ├── InvalidTensor         shape, datatype or contents do not fit the model
    │   ├── InvalidModel          not an ONNX model that we accept
    │   └── InvalidManifest       a manifest that does not parse or contradicts itself
    ├── NotFound                  nothing of that name
    │   ├── UnknownModel
    │   └── UnknownAgent
    ├── TooLarge                  over a stated bound
    ├── Conflict                  it exists already with other content
    ├── Unauthenticated           the caller did not say who it is, or not credibly
    ├── Forbidden                 policy does not allow it
    │   ├── Untrusted             a signature, certificate or signed statement does not hold
    │   ├── Quarantined           it failed on this machine before
    │   └── PermissionRequired    it costs money, and nobody has said yes yet
    ├── DiskFull                  there is no room for it on this machine
    ├── Overloaded                a bounded queue is full; try again later
    ├── Unavailable               a part that is needed is away; try again later
    │   ├── ModelNotReady         known, but not loaded yet or not loadable
    │   └── HeavyUnavailable      the heavy tier is away or its breaker is open
    ├── DeadlineExceeded          the caller's time is over
    ├── IntegrityError            bytes are not what their digest says
    └── InternalError             a defect of ours

Each class has a `code`, the stable word that travels on every wire (`core.status` maps it to gRPC and HTTP), and says
whether the same call may succeed later (`retryable`). Messages say what was expected, what came and what to do.
"""

from enum import StrEnum
from typing import ClassVar, Self


class ErrorCode(StrEnum):
    INVALID_REQUEST = "invalid_request"
    NOT_FOUND = "not_found"
    TOO_LARGE = "too_large"
    CONFLICT = "conflict"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    DISK_FULL = "disk_full"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INTEGRITY = "integrity"
    INTERNAL = "internal"


class NanofleetError(Exception):
    """Base of the tree; never raised itself."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    retryable: ClassVar[bool] = False
    # When to try again, of a retryable error whose raiser can tell; travels as `retry-after-ms` or Retry-After.
    retry_after_s: float | None = None

    def after(self, seconds: float) -> Self:
        """Say when the same call may succeed, and return this error."""
        self.retry_after_s = seconds
        return self


class InvalidRequest(NanofleetError):
    code = ErrorCode.INVALID_REQUEST


class InvalidName(InvalidRequest):
    pass


class InvalidTensor(InvalidRequest):
    pass


class InvalidModel(InvalidRequest):
    pass


class InvalidManifest(InvalidRequest):
    pass


class NotFound(NanofleetError):
    code = ErrorCode.NOT_FOUND


class UnknownModel(NotFound):
    pass


class UnknownAgent(NotFound):
    pass


class TooLarge(NanofleetError):
    code = ErrorCode.TOO_LARGE


class Conflict(NanofleetError):
    code = ErrorCode.CONFLICT


class Unauthenticated(NanofleetError):
    code = ErrorCode.UNAUTHENTICATED


class Forbidden(NanofleetError):
    code = ErrorCode.FORBIDDEN


class Untrusted(Forbidden):
    pass


class Quarantined(Forbidden):
    pass


class PermissionRequired(Forbidden):
    pass


class DiskFull(NanofleetError):
    code = ErrorCode.DISK_FULL
    retryable = True


class Overloaded(NanofleetError):
    code = ErrorCode.OVERLOADED
    retryable = True


class Unavailable(NanofleetError):
    code = ErrorCode.UNAVAILABLE
    retryable = True


class ModelNotReady(Unavailable):
    pass


class HeavyUnavailable(Unavailable):
    pass


class DeadlineExceeded(NanofleetError):
    code = ErrorCode.DEADLINE_EXCEEDED


class IntegrityError(NanofleetError):
    code = ErrorCode.INTEGRITY
    retryable = True


class InternalError(NanofleetError):
    code = ErrorCode.INTERNAL
