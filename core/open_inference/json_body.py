"""Messages <-> JSON bodies (`application/json`), Open Inference Protocol v2, section "Inference Request JSON Object".

Tensors travel as `data`, flat or nested; FP16, BF16 and numbers that are not finite need `binary_body`.
"""

from core.open_inference import json_document
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits, InferRequest, InferResponse


def decode_request(
    body: bytes, *, model_name: str, model_version: str = "", limits: BodyLimits = DEFAULT_LIMITS
) -> InferRequest:
    """Return the request in `body` for the model that its path or topic names.

    Raises:
        InvalidRequest: not a well-formed request; InvalidTensor where one tensor is at fault.
        TooLarge: over one of the limits.
    """
    document = json_document.parse(body, limits)
    return json_document.decode_request(
        document, model_name=model_name, model_version=model_version, tail=None, limits=limits
    )


def encode_request(request: InferRequest) -> bytes:
    """Return the body of `request`.

    Raises:
        InvalidTensor: an input holds NaN or infinity.
        InvalidRequest: an input has no JSON form.
    """
    document = json_document.request_head(request, binary_output=request.binary_output)
    document["inputs"] = [json_document.encode_tensor(tensor) for tensor in request.inputs]
    return json_document.dump(document, request.inputs, kind="input")


def decode_response(body: bytes, *, limits: BodyLimits = DEFAULT_LIMITS) -> InferResponse:
    """Return the response in `body`; raises like `decode_request`."""
    return json_document.decode_response(json_document.parse(body, limits), tail=None, limits=limits)


def encode_response(response: InferResponse) -> bytes:
    """Return the body of `response`.

    Raises:
        InternalError: an output holds NaN or infinity.
        InvalidRequest: an output cannot travel as JSON and should have been asked for as binary data.
    """
    document = json_document.response_head(response)
    document["outputs"] = [json_document.encode_tensor(tensor) for tensor in response.outputs]
    return json_document.dump(document, response.outputs, kind="output")
