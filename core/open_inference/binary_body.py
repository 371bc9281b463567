"""Messages <-> binary-tensor bodies: a JSON header, then the raw bytes of the tensors in their order.

Source: Triton's extension "binary tensor data". The length of the header travels outside of the body: in HTTP as
`Inference-Header-Content-Length`, in MQTT as the user property `inference-header-content-length`.
"""

from collections.abc import Collection, Sequence

from core.errors import InvalidRequest
from core.open_inference import json_document
from core.open_inference.bounds import require_size
from core.open_inference.json_document import Document, RawTail
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, InferResponse
from core.open_inference.raw_elements import raw_of
from core.tensors import Tensor


def decode_request(
    body: bytes,
    *,
    header_length: int,
    model_name: str,
    model_version: str = "",
    limits: BodyLimits = DEFAULT_LIMITS,
) -> InferRequest:
    """Return the request in `body`, whose JSON header has `header_length` bytes. Its arrays may be views of `body`.

    Raises:
        InvalidRequest: not a well-formed request; InvalidTensor where one tensor is at fault.
        TooLarge: over one of the limits.
    """
    document, tail = _split(body, header_length, limits)
    request = json_document.decode_request(
        document, model_name=model_name, model_version=model_version, tail=tail, limits=limits
    )
    tail.require_empty()
    return request


def encode_request(request: InferRequest) -> tuple[bytes, int]:
    """Return body and header length; every input is raw, and so shall every output be that says nothing itself."""
    document = json_document.request_head(request, binary_output=True)
    return _join(document, "input", request.inputs, raw={tensor.name for tensor in request.inputs})


def decode_response(body: bytes, *, header_length: int, limits: BodyLimits = DEFAULT_LIMITS) -> InferResponse:
    """Return the response in `body`; raises like `decode_request`."""
    document, tail = _split(body, header_length, limits)
    response = json_document.decode_response(document, tail=tail, limits=limits)
    tail.require_empty()
    return response


def encode_response(response: InferResponse, *, binary: Collection[str]) -> tuple[bytes, int]:
    """Return body and header length; the outputs named in `binary` are raw, the others JSON elements."""
    return _join(json_document.response_head(response), "output", response.outputs, raw=binary)


def _split(body: bytes, header_length: int, limits: BodyLimits) -> tuple[Document, RawTail]:
    require_size(len(body), limits)
    if not 0 <= header_length <= len(body):
        raise InvalidRequest(f"header length: expected 0 to the body's {len(body)} bytes, got {header_length}")
    view = memoryview(body)
    return json_document.parse(view[:header_length], limits), RawTail(view[header_length:])


def _join(document: Document, kind: str, tensors: Sequence[Tensor], *, raw: Collection[str]) -> tuple[bytes, int]:
    pieces: list[bytes] = []
    entries: list[Document] = []
    for tensor in tensors:
        if tensor.name in raw:
            pieces.append(raw_of(tensor))
            entries.append(json_document.encode_raw_tensor(tensor, len(pieces[-1])))
        else:
            entries.append(json_document.encode_tensor(tensor))
    document[f"{kind}s"] = entries
    header = json_document.dump(document, [tensor for tensor in tensors if tensor.name not in raw], kind=kind)
    return b"".join((header, *pieces)), len(header)
