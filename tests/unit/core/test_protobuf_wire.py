"""The response written as bytes is the message that protobuf makes of it."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from core.open_inference import protobuf_body
from core.open_inference.messages import InferResponse, ParameterValue
from core.open_inference.protobuf_wire import raw_response_bytes
from core.tensors import Tensor
from protos.inference.v2 import open_inference_pb2 as pb
from tests.support.open_inference_strategies import responses, tensor_tuples

NAMES = st.text(max_size=200)
VALUES: st.SearchStrategy[ParameterValue] = (
    st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | NAMES
)


def require_same(response: InferResponse) -> None:
    written = pb.ModelInferResponse.FromString(raw_response_bytes(response))
    assert written == protobuf_body.encode_response(response, raw=True)


@given(responses())
def test_a_raw_response_is_what_the_message_would_be(response: InferResponse) -> None:
    require_same(response)


@given(NAMES, NAMES, NAMES, st.dictionaries(NAMES, VALUES, max_size=4), tensor_tuples())
def test_whatever_its_texts_and_parameters_are(
    model: str, version: str, request_id: str, parameters: Mapping[str, ParameterValue], outputs: tuple[Tensor, ...]
) -> None:
    require_same(InferResponse(model, version, outputs, request_id, parameters))
