"""An in-memory data plane: model `echo`, versions 1 and 2, answers every input as an output of the same name."""

from collections.abc import Sequence

from core.errors import UnknownModel
from core.open_inference.messages import InferRequest, InferResponse, ModelIndexEntry, ModelMetadata
from core.open_inference.service import Call
from core.tensors import Datatype, TensorSpec


class EchoPlane:
    """Records what it was asked; `refuse_with` makes it refuse every inference."""

    def __init__(self) -> None:
        self.ready = True
        self.refuse_with: Exception | None = None
        self.requests: list[InferRequest] = []
        self.calls: list[Call] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []

    async def is_ready(self) -> bool:
        return self.ready

    async def index(self) -> Sequence[ModelIndexEntry]:
        return [
            ModelIndexEntry("echo", "1", "READY"),
            ModelIndexEntry("echo", "2", "READY"),
            ModelIndexEntry("sleeping", "1", "UNAVAILABLE", "not loaded yet"),
        ]

    async def metadata(self, name: str, version: str) -> ModelMetadata:
        self._require(name, version)
        spec = (TensorSpec("x", Datatype.FP32, (-1, 2)),)
        return ModelMetadata(name, ("1", "2"), "onnx_onnxv1", spec, spec, {"variant": "original"})

    async def is_model_ready(self, name: str, version: str) -> bool:
        if name == "sleeping":
            return False
        self._require(name, version)
        return True

    async def load(self, name: str) -> None:
        self._require(name, "")
        self.loads.append(name)

    async def unload(self, name: str) -> None:
        self._require(name, "")
        self.unloads.append(name)

    async def infer(self, request: InferRequest, call: Call) -> InferResponse:
        self.requests.append(request)
        self.calls.append(call)
        if self.refuse_with is not None:
            raise self.refuse_with
        self._require(request.model_name, request.model_version)
        by_name = {tensor.name: tensor for tensor in request.inputs}
        wanted = [output.name for output in request.outputs] or list(by_name)
        outputs = tuple(by_name[name] for name in wanted)
        return InferResponse(request.model_name, request.model_version or "2", outputs, id=request.id)

    def _require(self, name: str, version: str) -> None:
        if name != "echo" or version not in ("", "1", "2"):
            raise UnknownModel(f"model {name!r} version {version!r}: expected echo, version 1 or 2")
