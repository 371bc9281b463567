"""What a request says of its answer: which outputs come raw, and until when it is of use."""

from typing import Any

import numpy as np
import pytest

from core.errors import InvalidRequest
from core.open_inference.messages import (
    MAX_TIMEOUT_US,
    InferRequest,
    InferResponse,
    Parameters,
    RequestedOutput,
    binary_outputs,
    timeout_s,
)
from core.tensors import Datatype, Tensor

RESPONSE = InferResponse("m", "1", tuple(Tensor(name, Datatype.INT8, np.zeros(1, np.int8)) for name in "abc"))


def request_with(parameters: Parameters) -> InferRequest:
    return InferRequest("m", (), parameters=parameters)


def test_outputs_are_elements_unless_the_request_says_otherwise() -> None:
    assert binary_outputs(InferRequest("m", ()), RESPONSE) == frozenset()


def test_the_default_of_the_request_holds_for_outputs_that_it_does_not_name() -> None:
    assert binary_outputs(InferRequest("m", (), binary_output=True), RESPONSE) == {"a", "b", "c"}


def test_what_an_output_says_itself_overrides_the_default() -> None:
    wishes = (RequestedOutput("a", binary=True), RequestedOutput("b", binary=False), RequestedOutput("c"))
    assert binary_outputs(InferRequest("m", (), outputs=wishes), RESPONSE) == {"a"}
    assert binary_outputs(InferRequest("m", (), outputs=wishes, binary_output=True), RESPONSE) == {"a", "c"}


def test_a_timeout_counts_microseconds_and_zero_is_none() -> None:
    assert timeout_s(request_with({"timeout": 1_500_000})) == 1.5
    assert timeout_s(request_with({"timeout": 0})) is None
    assert timeout_s(request_with({})) is None


@pytest.mark.parametrize("value", [-1, MAX_TIMEOUT_US + 1, True, 1.5, "1000"])
def test_a_timeout_of_another_type_or_range_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="'timeout': expected an integer"):
        timeout_s(request_with({"timeout": value}))
