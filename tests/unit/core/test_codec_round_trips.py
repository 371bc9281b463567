"""What one side encodes, the other decodes to the same, over every datatype and through every form of body."""

from dataclasses import replace

from hypothesis import given

from core.open_inference import binary_body, json_body, protobuf_body
from core.open_inference.messages import InferRequest, InferResponse, RequestedOutput
from tests.support.open_inference_strategies import PATIENT, requests, responses, same_tensors


def _same_request(one: InferRequest, other: InferRequest) -> bool:
    return same_tensors(one.inputs, other.inputs) and replace(one, inputs=()) == replace(other, inputs=())


def _same_response(one: InferResponse, other: InferResponse) -> bool:
    return same_tensors(one.outputs, other.outputs) and replace(one, outputs=()) == replace(other, outputs=())


@PATIENT
@given(requests(json=True))
def test_a_request_survives_a_json_body(request: InferRequest) -> None:
    decoded = json_body.decode_request(
        json_body.encode_request(request), model_name=request.model_name, model_version=request.model_version
    )
    assert _same_request(decoded, request)


@PATIENT
@given(responses(json=True))
def test_a_response_survives_a_json_body(response: InferResponse) -> None:
    assert _same_response(json_body.decode_response(json_body.encode_response(response)), response)


@PATIENT
@given(requests())
def test_a_request_survives_a_binary_body(request: InferRequest) -> None:
    body, header_length = binary_body.encode_request(request)
    decoded = binary_body.decode_request(
        body, header_length=header_length, model_name=request.model_name, model_version=request.model_version
    )
    assert _same_request(decoded, replace(request, binary_output=True))


@PATIENT
@given(responses())
def test_a_response_survives_a_binary_body(response: InferResponse) -> None:
    everything = {output.name for output in response.outputs}
    body, header_length = binary_body.encode_response(response, binary=everything)
    assert _same_response(binary_body.decode_response(body, header_length=header_length), response)


@PATIENT
@given(responses(json=True))
def test_a_response_survives_a_binary_body_in_which_only_the_first_output_is_raw(response: InferResponse) -> None:
    body, header_length = binary_body.encode_response(response, binary={response.outputs[0].name})
    assert _same_response(binary_body.decode_response(body, header_length=header_length), response)


@PATIENT
@given(requests())
def test_a_request_survives_a_protobuf_body(request: InferRequest) -> None:
    body = protobuf_body.encode_request(request).SerializeToString()
    decoded = protobuf_body.decode_request(protobuf_body.parse_request(body))
    # The protobuf form has no say on single outputs: raw inputs ask for raw outputs.
    outputs = tuple(RequestedOutput(output.name) for output in request.outputs)
    assert _same_request(decoded, replace(request, outputs=outputs, binary_output=True))


@PATIENT
@given(responses())
def test_a_response_survives_a_raw_protobuf_body(response: InferResponse) -> None:
    body = protobuf_body.encode_response(response, raw=True).SerializeToString()
    assert _same_response(protobuf_body.decode_response(protobuf_body.parse_response(body)), response)


@PATIENT
@given(responses())
def test_a_response_survives_a_typed_protobuf_body(response: InferResponse) -> None:
    body = protobuf_body.encode_response(response, raw=False).SerializeToString()
    assert _same_response(protobuf_body.decode_response(protobuf_body.parse_response(body)), response)
