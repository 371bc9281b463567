"""How models run, where their data may go, and who answers when they are not sure."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field

from core.privacy import PrivacyClass
from core.settings import Count, Seconds, Section
from edge_agent.settings.kinds import SecondsOrZero, none_when_empty


class RuntimeSettings(Section):
    """How models run."""

    intra_op_threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads inside one run; small models are fastest with one.

    More are shared by all models, and so many fewer run at one time. They keep their cores busy for about 5 ms after a
    run, which ONNX Runtime does not let us switch off: not for a battery.
    """
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    """Most requests in one run, for models that allow batching; a model's own limit may be lower."""
    max_batch_wait_s: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.005
    """Longest wait in seconds for others to share a run, where the average answer comes sooner for it.

    Measured run times and the rate of requests decide that; 0 takes only what waits already.
    """
    max_queue: Count = 256
    """Requests that may wait per model; beyond it the client with the most gives way (status 429)."""
    reply_reserve_s: SecondsOrZero = 0.02
    """Part of a request's deadline that is kept back for the way to and from the device; at most a quarter of it."""
    drain_timeout_s: Seconds = 10.0
    """Seconds that a replaced model gets to finish its requests."""


class ResidencySettings(Section):
    """Which of the models that this agent runs are in memory."""

    budget_bytes: Annotated[int | None, Field(ge=1), BeforeValidator(none_when_empty)] = None
    """Memory that models may take together; unset: what is available at start, less `reserve_bytes`.

    Available is what the kernel says, and what the limits of the cgroups above leave. What a model takes is measured.
    """
    reserve_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    """Memory that a load must leave available on this machine, whatever the budget says."""
    protect_s: SecondsOrZero = 0.1
    """Seconds after its load that a model stays; only one that has waited for as long comes in its place."""
    protect_loads: SecondsOrZero = 1.0
    """The same in times what its load took, where that is longer; 1: no place loads for over half of the time."""
    max_wait_s: Seconds = 30.0
    """Seconds that a model waits for room, after which its requests are refused."""


# A name of a client, or a pattern of the shell for several.
ClientPattern = Annotated[str, Field(min_length=1, max_length=128)]


class PrivacySettings(Section):
    """How far data from devices may go, whatever their requests say; the strictest word counts."""

    default: PrivacyClass = "any"
    """For devices that `devices` does not name, and for requests that name no client."""
    devices: Annotated[Mapping[ClientPattern, PrivacyClass], Field(max_length=1000)] = Field(default_factory=dict)
    """By the client's name as in its topics, or a shell pattern such as `"ward-*"`."""


class ModelSettings(Section):
    """What this agent makes of one model, beyond what the model's manifest says."""

    privacy: PrivacyClass = "any"
    """Where the data of requests to this model may go, whatever else they say; the strictest word counts."""
    pinned: bool = False
    """True: once loaded, it never leaves memory."""
    prewarm: bool = False
    """True: after a start it stays in memory before models that nobody asked for, as if it was asked once just now."""
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory for answers to be given again to equal requests; 0: none are kept."""
    samples: bool | None = None
    """True: hard examples of this model are kept, False: not; when it is not set, as `[samples] enabled` says."""


class OffloadSettings(Section):
    """Asking the heavy tier when the local answer is not sure enough."""

    default_timeout_s: Seconds = 2.0
    """Seconds that the heavy tier may take for a request without a deadline of its own."""
    reply_reserve_s: SecondsOrZero = 0.02
    """Part of a request's deadline that is kept back for sending the reply."""
    max_in_flight: Count = 64
    """Escalations under way at one time; beyond it the edge answers."""
