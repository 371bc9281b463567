"""The stock tritonclient over HTTP and gRPC against our faces, over real ONNX models."""

from collections.abc import Iterator

import pytest

from tests.support.onnx_plane import Faces, conformance_plane, running_faces
from tests.support.triton_client import run_checks

SHARED = (
    "server_and_models_are_ready",
    "an_unknown_model_is_not_ready",
    "server_metadata_names_the_extensions",
    "model_metadata_names_inputs_and_outputs",
    "metadata_of_an_unknown_model_is_not_found",
    "the_index_lists_ready_models",
    "what_is_not_served_is_refused",
    "every_datatype_comes_back_as_it_went",
    "bfloat16_comes_back_as_it_went",
    "a_model_computes",
    "requested_outputs_come_in_the_requested_order",
    "id_model_and_version_are_told",
    "an_empty_batch_is_answered",
    "four_megabytes_are_answered",
    "an_unknown_model_or_version_is_refused",
    "a_wrong_shape_is_refused_naming_both",
    "a_wrong_datatype_is_refused_naming_both",
    "a_missing_input_is_refused",
    "an_unknown_output_is_refused",
    "a_body_beyond_the_bound_is_refused",
    "a_timeout_that_has_passed_is_told",
    "compressed_requests_are_read",
    "the_asyncio_client_is_answered",
)
HTTP_ONLY = (
    "every_datatype_comes_back_as_json",
    "json_and_binary_mix_in_one_request",
    "a_json_request_may_have_binary_answers",
    "asking_for_compressed_answers_does_no_harm",
    "sixteen_requests_in_flight_are_answered",
)
GRPC_ONLY = (
    "typed_contents_are_answered_with_typed_contents",
    "raw_contents_are_answered_with_raw_contents",
    "raw_and_typed_contents_together_are_refused",
    "callbacks_are_called_once_each",
)


@pytest.fixture(scope="module")
def faces() -> Iterator[Faces]:
    with running_faces(conformance_plane()) as running:
        yield running


@pytest.fixture(scope="module")
def http_results(faces: Faces) -> dict[str, str]:
    return run_checks("http_checks", faces.http)


@pytest.fixture(scope="module")
def grpc_results(faces: Faces) -> dict[str, str]:
    return run_checks("grpc_checks", faces.grpc)


@pytest.mark.parametrize("check", [*SHARED, *HTTP_ONLY])
def test_http(http_results: dict[str, str], check: str) -> None:
    assert not http_results[check], http_results[check]


@pytest.mark.parametrize("check", [*SHARED, *GRPC_ONLY])
def test_grpc(grpc_results: dict[str, str], check: str) -> None:
    assert not grpc_results[check], grpc_results[check]


def test_no_check_goes_unread(http_results: dict[str, str], grpc_results: dict[str, str]) -> None:
    assert http_results.keys() == {*SHARED, *HTTP_ONLY}
    assert grpc_results.keys() == {*SHARED, *GRPC_ONLY}
