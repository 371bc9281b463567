"""The messages of the Open Inference Protocol v2, free of any wire format.

Every face decodes into these and encodes from these; `json_body`, `binary_body` and `protobuf_body` are the codecs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from core.errors import InvalidRequest
from core.tensors import Tensor, TensorSpec

ParameterValue = bool | int | float | str
Parameters = Mapping[str, ParameterValue]
NO_PARAMETERS: Parameters = MappingProxyType({})
# Chosen: longer than any answer is of use, short enough that no clock arithmetic overflows.
MAX_TIMEOUT_US = 24 * 3600 * 1_000_000


def _no_parameters() -> Parameters:
    # A mapping proxy cannot be hashed before Python 3.12, so dataclasses take it for a mutable default.
    return NO_PARAMETERS


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    name: str
    # Asked to come as raw bytes; None leaves it to `InferRequest.binary_output`.
    binary: bool | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference request. `model_version` empty means the latest; no `outputs` means all of them.

    `parameters` are those of the request as a whole, without `binary_data_output`: that is `binary_output`.
    """

    model_name: str
    inputs: tuple[Tensor, ...]
    model_version: str = ""
    id: str = ""
    parameters: Parameters = field(default_factory=_no_parameters)
    outputs: tuple[RequestedOutput, ...] = ()
    # The caller's default for outputs that say nothing themselves; in protobuf, that its own inputs came raw.
    binary_output: bool = False


@dataclass(frozen=True, slots=True)
class InferResponse:
    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Parameters = field(default_factory=_no_parameters)


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
    # A value takes 2 bytes of body but up to 72 of memory, a member of an object 5 but 150. More elements than this
    # belong into a binary body.
    # Also the fields of one protobuf body: packed or raw elements are one, every other element is one of its own.
    max_json_values: int = 1 << 20
    max_json_members: int = 1 << 16
    # Per request; bounds every set of parameters.
    max_parameters: int = 64
    # Names, ids and parameter values; not the elements of BYTES tensors.
    max_text_chars: int = 1024


DEFAULT_LIMITS = BodyLimits()


def binary_outputs(request: InferRequest, response: InferResponse) -> frozenset[str]:
    """Return the names of the outputs that `request` wants as raw bytes."""
    if not request.outputs and not request.binary_output:
        return frozenset()
    asked = {output.name: output.binary for output in request.outputs if output.binary is not None}
    default = request.binary_output
    return frozenset(output.name for output in response.outputs if asked.get(output.name, default))


def timeout_s(request: InferRequest) -> float | None:
    """Return the seconds in which the caller wants the answer; None: it says nothing.

    The parameter `timeout` of Triton's schedule-policy extension, in microseconds; 0 stands for no timeout.

    Raises:
        InvalidRequest: it is not an integer of 0 to MAX_TIMEOUT_US.
    """
    timeout_us = request.parameters.get("timeout", 0)
    # bool is an int to isinstance; on the wire it is another type.
    if type(timeout_us) is not int or not 0 <= timeout_us <= MAX_TIMEOUT_US:
        raise InvalidRequest(
            f"parameter 'timeout': expected an integer of 0 to {MAX_TIMEOUT_US} microseconds, got {timeout_us!r:.80}"
        )
    return timeout_us / 1e6 if timeout_us else None
