"""Messages <-> JSON bodies (`application/json`), Open Inference Protocol v2, section "Inference Request JSON Object".

Tensors travel as `data`, flat or nested; FP16, BF16 and numbers that are not finite need `binary_body`.
"""

from core.open_inference.json_document import (
    decode_request as _decode_request,
)
from core.open_inference.json_document import (
    decode_response as _decode_response,
)
from core.open_inference.json_document import dump, encode_tensor, parse, request_head, response_head
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, InferResponse


def decode_request(
    body: bytes, *, model_name: str, model_version: str = "", limits: BodyLimits = DEFAULT_LIMITS
) -> InferRequest:
    """Return the request in `body` for the model that its path or topic names.

    Raises:
        InvalidRequest: not a well-formed request; InvalidTensor where one tensor is at fault.
        TooLarge: over one of the limits.
    """
    return _decode_request(
        parse(body, limits), model_name=model_name, model_version=model_version, tail=None, limits=limits
    )


def encode_request(request: InferRequest) -> bytes:
    document = request_head(request, binary_output=request.binary_output)
    document["inputs"] = [encode_tensor(tensor) for tensor in request.inputs]
    return dump(document, request.inputs, kind="input")


def decode_response(body: bytes, *, limits: BodyLimits = DEFAULT_LIMITS) -> InferResponse:
    """Return the response in `body`; raises like `decode_request`."""
    return _decode_response(parse(body, limits), tail=None, limits=limits)


def encode_response(response: InferResponse) -> bytes:
    """Return the body of `response`.

    Raises:
        InternalError: an output holds NaN or infinity.
        InvalidRequest: an output cannot travel as JSON and should have been asked for as binary data.
    """
    document = response_head(response)
    document["outputs"] = [encode_tensor(tensor) for tensor in response.outputs]
    return dump(document, response.outputs, kind="output")
