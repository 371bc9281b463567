"""What a request asks, whoever asks it and until when: two requests with equal contents have one answer.

A content is a whole key, not a digest: whoever compares two of them never takes one request for another.
"""

from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor

Content = tuple[object, ...]


def content_of(request: InferRequest) -> Content:
    """Return model, inputs and wanted outputs of `request`, without its id and parameters."""
    outputs = tuple([output.name for output in request.outputs])
    return request.model_name, request.model_version, outputs, tuple([_tensor(tensor) for tensor in request.inputs])


def _tensor(tensor: Tensor) -> Content:
    array = tensor.array
    # The array of BYTES holds pointers.
    elements = tuple(array.ravel().tolist()) if tensor.datatype is Datatype.BYTES else array.tobytes()
    return tensor.name, tensor.datatype.value, array.shape, elements
