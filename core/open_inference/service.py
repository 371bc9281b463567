"""The one data plane under every face: HTTP, gRPC and MQTT decode into its messages, call it, and encode what it gives.

The gateway and the edge agent each implement `DataPlane`. A face adds nothing of its own: whatever a plane refuses, it
refuses with an error of `core.errors`, and `core.status` says what that is on the wire.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.deadline import Deadline
from core.open_inference.messages import InferRequest, InferResponse, ModelIndexEntry, ModelMetadata
from core.open_inference.statistics import ModelStatistics

# What every face of ours implements beyond the protocol's core; a face names these, and what its plane adds.
EXTENSIONS = ("binary_tensor_data", "model_repository")


@dataclass(frozen=True, slots=True)
class Call:
    """What travels beside a request: until when an answer is of use, the W3C context of its caller, and its name."""

    deadline: Deadline | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    # As its certificate says; empty where callers show none.
    client: str = ""


class DataPlane(Protocol):
    """Whatever answers inference requests. A `version` of "" means the latest."""

    async def is_ready(self) -> bool:
        """Say whether requests may be sent here at all."""
        ...

    async def index(self) -> Sequence[ModelIndexEntry]: ...

    async def metadata(self, name: str, version: str) -> ModelMetadata:
        """Describe one model.

        Raises:
            UnknownModel: no model of that name and version.
        """
        ...

    async def is_model_ready(self, name: str, version: str) -> bool:
        """Say whether the model can answer now.

        Raises:
            UnknownModel: no model of that name and version.
        """
        ...

    async def load(self, name: str) -> None:
        """Bring the model into memory and keep it there; return when it can answer.

        Raises:
            UnknownModel: no model of that name.
            Forbidden: nobody may say so here; the message says who decides.
            ModelNotReady: it cannot be loaded, or there is no room for it now.
        """
        ...

    async def unload(self, name: str) -> None:
        """Let the model finish what it has and take it out of memory; it is not ready until it is loaded again.

        Raises:
            UnknownModel: no model of that name.
            Forbidden: nobody may say so here; the message says who decides.
        """
        ...

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        """Answer one request with the outputs that it asks for, in its order; its `id` is echoed.

        Ends by `call.deadline`, with DeadlineExceeded if need be. Cancelling it gives up the request.

        Raises:
            NanofleetError: the request cannot be answered.
        """
        ...


class Statistics(Protocol):
    """What has counted the requests of a plane."""

    async def statistics(self, name: str, version: str) -> Sequence[ModelStatistics]:
        """Return what is known of a model, or of every model when `name` is empty.

        Raises:
            UnknownModel: no model of that name and version.
        """
        ...
