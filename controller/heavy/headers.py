"""The HTTP headers between the gateway and the heavy tier; a server that does not know the latter two ignores them."""

from typing import Final

# Serve's own header for multiplexing; it routes by it before a replica sees the request.
MODEL_ID: Final = "serve_multiplexed_model_id"
# What is left of the caller's time, in milliseconds, when the request left the gateway.
DEADLINE_MS: Final = "x-deadline-ms"
# Open Inference Protocol, binary tensor data extension: size in bytes of the JSON in front of the tensors.
HEADER_LENGTH: Final = "inference-header-content-length"
