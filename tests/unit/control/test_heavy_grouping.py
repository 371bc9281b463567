import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.heavy.grouping import plan_groups, rows_of, stack, take_apart
from core.errors import InternalError
from core.tensors import Array


def feed(rows: int, width: int = 2, *, value: float = 0.0) -> dict[str, Array]:
    return {"x": np.full((rows, width), value, np.float32)}


FEEDS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), max_size=20)


@given(FEEDS, st.integers(1, 8))
def test_every_request_runs_exactly_once(shapes: list[tuple[int, int]], max_rows: int) -> None:
    groups = plan_groups([feed(*shape) for shape in shapes], max_rows=max_rows)
    assert sorted(index for group in groups for index in group) == list(range(len(shapes)))


@given(FEEDS, st.integers(1, 8))
def test_no_group_exceeds_its_rows_unless_one_request_does(shapes: list[tuple[int, int]], max_rows: int) -> None:
    for group in plan_groups([feed(*shape) for shape in shapes], max_rows=max_rows):
        assert len(group) == 1 or sum(shapes[index][0] for index in group) <= max_rows


@given(FEEDS, st.integers(2, 8))
def test_what_is_stacked_comes_apart_as_it_was(shapes: list[tuple[int, int]], max_rows: int) -> None:
    feeds = [feed(*shape, value=float(index)) for index, shape in enumerate(shapes)]
    for group in plan_groups(feeds, max_rows=max_rows):
        members = [feeds[index] for index in group]
        for member, part in zip(members, take_apart(stack(members), [rows_of(m) for m in members]), strict=True):
            np.testing.assert_array_equal(part["x"], member["x"])


def test_requests_of_one_shape_share_a_run() -> None:
    assert plan_groups([feed(1), feed(2), feed(1)], max_rows=4) == [[0, 1, 2]]


def test_requests_of_different_shapes_do_not_share_a_run() -> None:
    assert plan_groups([feed(1, 2), feed(1, 3), feed(1, 2)], max_rows=4) == [[0, 2], [1]]


def test_a_model_that_does_not_batch_runs_every_request_alone() -> None:
    assert plan_groups([feed(1), feed(1)], max_rows=1) == [[0], [1]]


def test_inputs_without_a_common_first_dimension_run_alone() -> None:
    odd = {"x": np.zeros((2, 2), np.float32), "y": np.zeros((3,), np.float32)}
    scalar = {"x": np.zeros((), np.float32)}
    assert plan_groups([odd, odd, scalar, scalar], max_rows=8) == [[0], [1], [2], [3]]


def test_an_output_that_does_not_follow_the_batch_is_a_defect_of_the_manifest() -> None:
    with pytest.raises(InternalError, match=r"'x': expected 3 rows for a batch, got shape \[2, 2\]"):
        take_apart(feed(2), [1, 2])
