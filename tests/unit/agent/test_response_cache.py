"""The response cache: whole keys, a budget in bytes, the least used go first."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from core.open_inference.messages import InferRequest, InferResponse
from core.tensors import Datatype, Tensor
from edge_agent.cascade.policy import Reason
from edge_agent.request_content import Content, content_of
from edge_agent.runtime.response_cache import Kept, ResponseCache
from tests.support.edge_plane import request_of, scores_tensor


class Colliding(bytes):
    """Two of them always have the same hash."""

    def __hash__(self) -> int:
        return 1


def kept(value: float = 1.0, *, values: int = 3) -> Kept:
    return Kept(InferResponse("digits", "3", (scores_tensor("s", (value,) * values),)), Reason.CONFIDENT, 0.9)


def key_of(*values: float) -> Content:
    return content_of(request_of(values))


def test_what_was_put_is_found_under_an_equal_key_only() -> None:
    cache = ResponseCache(max_bytes=1 << 20)
    answer = kept(7)
    cache.put(key_of(1, 2), answer)
    assert cache.find(key_of(1, 2)) is answer
    assert cache.find(key_of(1, 3)) is None
    assert (cache.hits, cache.misses) == (1, 1)


def test_two_keys_with_one_hash_are_still_two() -> None:
    cache = ResponseCache(max_bytes=1 << 20)
    mine, other = (Colliding(b"mine"),), (Colliding(b"other"),)
    cache.put(mine, kept(7))
    assert hash(mine) == hash(other)
    assert cache.find(other) is None


def test_the_least_recently_used_go_first() -> None:
    probe = ResponseCache(max_bytes=1 << 20)
    probe.put(key_of(1), kept())
    cache = ResponseCache(max_bytes=2 * probe.size_bytes)
    cache.put(key_of(1), kept())
    cache.put(key_of(2), kept())
    cache.find(key_of(1))
    cache.put(key_of(3), kept())
    assert [cache.find(key_of(number)) is not None for number in (1, 2, 3)] == [True, False, True]


def test_an_answer_that_is_larger_than_the_budget_is_not_kept_and_pushes_nothing_out() -> None:
    cache = ResponseCache(max_bytes=4000)
    cache.put(key_of(1), kept())
    cache.put(key_of(2), kept(values=10_000))
    assert (cache.find(key_of(1)) is not None, cache.find(key_of(2))) == (True, None)


def test_large_inputs_count_though_the_answer_is_small() -> None:
    image = InferRequest("digits", (Tensor("x", Datatype.UINT8, np.zeros((1, 100_000), np.uint8)),))
    cache = ResponseCache(max_bytes=1 << 20)
    cache.put(content_of(image), kept())
    assert cache.size_bytes > 100_000


def test_texts_count_by_their_length() -> None:
    texts = InferRequest("digits", (Tensor("x", Datatype.BYTES, np.array([b"a" * 5000], dtype=object)),))
    cache = ResponseCache(max_bytes=1 << 20)
    cache.put(content_of(texts), kept())
    assert cache.size_bytes > 5000


def test_a_cleared_cache_holds_nothing() -> None:
    cache = ResponseCache(max_bytes=1 << 20)
    cache.put(key_of(1), kept())
    cache.clear()
    assert (len(cache), cache.size_bytes, cache.find(key_of(1))) == (0, 0, None)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 400), st.booleans()), max_size=80))
def test_whatever_comes_the_budget_holds_and_nothing_is_found_that_was_not_put(
    steps: list[tuple[int, int, bool]],
) -> None:
    cache = ResponseCache(max_bytes=6000)
    latest: dict[int, float] = {}
    for at, (number, values, is_put) in enumerate(steps):
        key = key_of(number)
        if is_put:
            cache.put(key, kept(at, values=values))
            latest[number] = at
            continue
        found = cache.find(key)
        if found is not None:
            assert found.response.outputs[0].array[0, 0] == latest[number]
    assert 0 <= cache.size_bytes <= 6000
    assert (cache.size_bytes == 0) == (len(cache) == 0)
