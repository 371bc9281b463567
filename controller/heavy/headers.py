"""The HTTP headers between the gateway and the heavy tier; a server that does not know them ignores them."""

from typing import Final

from core.errors import InvalidRequest

# Serve's own header for multiplexing; it routes by it before a replica sees the request.
MODEL_ID: Final = "serve_multiplexed_model_id"
# What is left of the caller's time, in milliseconds, when the request left the gateway.
DEADLINE_MS: Final = "x-deadline-ms"
# Chosen: an hour. Longer deadlines are cut to it, because a caller may set one of years to mean none.
MAX_DEADLINE_MS: Final = 3_600_000
# Serve's own header for how long a request may take; Serve cancels the replica's work then and answers 408.
SERVE_TIMEOUT_S: Final = "x-request-timeout-seconds"
# Open Inference Protocol, binary tensor data extension: size in bytes of the JSON in front of the tensors.
HEADER_LENGTH: Final = "inference-header-content-length"
# Bodies are bounded far below what so many digits can say.
_MAX_LENGTH_DIGITS = 9


def parse_header_length(text: str) -> int:
    """Return the value of HEADER_LENGTH.

    Raises:
        InvalidRequest: it is not a number of bytes.
    """
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_LENGTH_DIGITS):
        raise InvalidRequest(f"expected {HEADER_LENGTH} to be a number of bytes, got {text[:80]!r}")
    return int(text)
