"""Which operation a path of the Open Inference Protocol names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.open_inference.http_paths import ENDPOINTS, Operation, Target, target_of

MODEL = "/v2/models/{model}"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2", Target(Operation.SERVER_METADATA, "/v2")),
        ("/v2/", Target(Operation.SERVER_METADATA, "/v2/")),
        ("/v2/models/stats", Target(Operation.STATISTICS, "/v2/models/stats")),
        ("/v2/models/a%20b/infer", Target(Operation.INFER, f"{MODEL}/infer", "a b")),
        ("/v2/models/m/versions/7/infer", Target(Operation.INFER, f"{MODEL}/versions/{{version}}/infer", "m", "7")),
        ("/v2/models/m/stats", Target(Operation.STATISTICS, f"{MODEL}/stats", "m")),
        ("/v2/repository/models/m/unload", Target(Operation.UNLOAD, "/v2/repository/models/{model}/unload", "m")),
        ("/v2/models/..%2Fsecret", Target(Operation.MODEL_METADATA, MODEL, "../secret")),
        ("/v2/models/", None),
        ("/v2/models//infer", None),
        ("/v2/models/m/infer/", None),
        ("/v2x", None),
        ("", None),
    ],
)
def test_a_path_names_one_operation_or_none(path: str, expected: Target | None) -> None:
    assert target_of(path) == expected


@given(st.text(max_size=200))
def test_no_path_makes_it_fail(path: str) -> None:
    found = target_of(path)
    assert found is None or found.template in ENDPOINTS[found.operation].paths
