"""Two requests are the same when they ask the same of the same model, whoever asks and until when."""

from dataclasses import replace

import numpy as np
import pytest

from core.open_inference.messages import InferRequest, RequestedOutput
from core.tensors import Datatype, Tensor
from edge_agent.request_content import content_of
from tests.support.edge_plane import request_of


def words(*elements: bytes) -> InferRequest:
    return InferRequest("digits", (Tensor("x", Datatype.BYTES, np.array(elements, dtype=object)),))


def test_id_and_parameters_do_not_count() -> None:
    assert content_of(request_of((1, 2), request_id="a", deadline_ms=5)) == content_of(request_of((1, 2)))


@pytest.mark.parametrize(
    "other",
    [
        request_of((1, 3)),
        request_of((1, 2), model="letters"),
        replace(request_of((1, 2)), model_version="2"),
        replace(request_of((1, 2)), outputs=(RequestedOutput("scores"),)),
        InferRequest("digits", (Tensor("x", Datatype.FP32, np.array([1, 2], dtype=np.float32)),)),
        InferRequest("digits", (Tensor("x", Datatype.INT32, np.array([[1, 2]], dtype=np.float32)),)),
        InferRequest("digits", (Tensor("y", Datatype.FP32, np.array([[1, 2]], dtype=np.float32)),)),
    ],
    ids=["value", "model", "version", "outputs", "shape", "datatype", "name"],
)
def test_everything_that_is_asked_counts(other: InferRequest) -> None:
    assert content_of(other) != content_of(request_of((1, 2)))


def test_texts_count_by_what_they_say_and_where_they_end() -> None:
    assert content_of(words(b"ab", b"c")) == content_of(words(b"ab", b"c"))
    assert content_of(words(b"ab", b"c")) != content_of(words(b"a", b"bc"))
    assert hash(content_of(words(b"ab"))) == hash(content_of(words(b"ab")))


def test_a_view_of_a_larger_array_counts_like_a_copy() -> None:
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)
    column = InferRequest("digits", (Tensor("x", Datatype.FP32, whole[:, 1]),))
    copied = InferRequest("digits", (Tensor("x", Datatype.FP32, whole[:, 1].copy()),))
    assert content_of(column) == content_of(copied)
