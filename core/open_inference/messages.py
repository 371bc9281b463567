"""The messages of the Open Inference Protocol v2, free of any wire format.

Every face decodes into these and encodes from these; `json_body`, `binary_body` and `protobuf_body` are the codecs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from core.tensors import Tensor, TensorSpec

ParameterValue = bool | int | float | str
Parameters = Mapping[str, ParameterValue]
NO_PARAMETERS: Parameters = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    name: str
    # Asked to come as raw bytes; None leaves it to `InferRequest.binary_output`.
    binary: bool | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference request. `model_version` empty means the latest; no `outputs` means all of them."""

    model_name: str
    inputs: tuple[Tensor, ...]
    model_version: str = ""
    id: str = ""
    parameters: Parameters = NO_PARAMETERS
    outputs: tuple[RequestedOutput, ...] = ()
    # The caller's default for outputs that say nothing themselves.
    binary_output: bool = False


@dataclass(frozen=True, slots=True)
class InferResponse:
    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Parameters = NO_PARAMETERS


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelIndexEntry:
    """One line of the repository index; `state` is READY, UNAVAILABLE, LOADING or UNLOADING."""

    name: str
    version: str
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bounds on what a peer may send; all are checked before memory is spent."""

    max_body_bytes: int = 16 << 20
    # Elements of one tensor; bounds what a small body with a huge shape can ask for.
    max_elements: int = 4 << 20
    max_tensors: int = 64
    max_dimensions: int = 8
    max_json_depth: int = 16
    max_text_chars: int = 1024


DEFAULT_LIMITS = BodyLimits()
