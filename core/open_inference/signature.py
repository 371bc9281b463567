"""Whether a request fits a model: the names, datatypes and shapes of its manifest, checked before anything runs."""

from dataclasses import dataclass
from typing import Self

from core.errors import InvalidTensor
from core.manifest import Manifest
from core.open_inference.messages import InferRequest
from core.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """The inputs and outputs of one model, by name, in the order of its manifest."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        return cls(
            {part.name: part.spec() for part in manifest.inputs}, {part.name: part.spec() for part in manifest.outputs}
        )

    def require(self, request: InferRequest) -> None:
        """Raise InvalidTensor unless `request` gives every input once, as specified, and asks for known outputs."""
        names = [tensor.name for tensor in request.inputs]
        if len(names) != len(self.inputs) or set(names) != self.inputs.keys():
            raise InvalidTensor(f"expected the inputs {list(self.inputs)}, each once, got {_named(names)}")
        for tensor in request.inputs:
            self.inputs[tensor.name].require(tensor)
        for output in request.outputs:
            if output.name not in self.outputs:
                raise InvalidTensor(f"expected outputs out of {list(self.outputs)}, got {_named([output.name])}")

    def wanted(self, request: InferRequest) -> tuple[str, ...]:
        """Return the names of the outputs that `request` asks for, in its order; all of them when it names none."""
        return tuple(output.name for output in request.outputs) or tuple(self.outputs)


def _named(names: list[str]) -> str:
    """Return names from a peer for an error message, bounded."""
    return str([name[:80] for name in names[:8]])
