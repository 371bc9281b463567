"""The structure of a JSON body is bounded on its raw bytes, before the parser sees them."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest, TooLarge
from core.open_inference import json_document
from core.open_inference.messages import DEFAULT_LIMITS, BodyLimits
from tests.support.open_inference_strategies import PATIENT, texts

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts | st.sampled_from(['[{":\\', '"]}', "[[[[", '\\"']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@PATIENT
@given(st.dictionaries(texts, json_values, max_size=4), st.integers(1, 6))
def test_exactly_what_is_nested_deeper_than_the_bound_is_refused(document: dict[str, object], bound: int) -> None:
    body = orjson.dumps(document)
    limits = BodyLimits(max_json_depth=bound)
    if depth_of(document) <= bound:
        assert json_document.parse(body, limits) == document
    else:
        with pytest.raises(InvalidRequest, match="nested"):
            json_document.parse(body, limits)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000, b'{"a":' * 50_000, b'{"a":' + b"[" * 17 + b"]" * 17 + b"}",
        b'["]",' * 50 + b"]" * 50, b'"' + b"[" * 100, b"\\" + b"[" * 100, b'{"a":[' * 40 + b'"',
    ],
)  # fmt: skip
def test_deep_or_unbalanced_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="expected JSON"):
        json_document.parse(body, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"[]", b"1", b"null", b'"text"', b"{", b"{}x", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":1e999}',
        b'{"a":"\xff"}', b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"a":"\\ud800"}', b'{"a":01}', b"{'a':1}", b'{"a":1,}',
    ],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="body: expected"):
        json_document.parse(body, DEFAULT_LIMITS)


def test_values_and_members_are_counted_and_bounded() -> None:
    limits = BodyLimits(max_json_values=20, max_json_members=20)
    elements: tuple[object, ...] = (1, "text", [], {})
    for element in elements:
        with pytest.raises(TooLarge, match="values: expected at most 20, got"):
            json_document.parse(orjson.dumps({"a": [element] * 29}), limits)
    with pytest.raises(TooLarge, match="members: expected at most 20, got 30"):
        json_document.parse(orjson.dumps({str(number): 1 for number in range(30)}), limits)


def test_brackets_colons_and_commas_in_texts_count_for_nothing() -> None:
    limits = BodyLimits(max_json_depth=2, max_json_values=6, max_json_members=1)
    document = {"[[[{{{::,,,": ["]]}},,,,", '":[{', "\\", '\\"[', ""]}
    assert json_document.parse(orjson.dumps(document), limits) == document
