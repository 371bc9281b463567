import pytest

from core.errors import InvalidRequest
from edge_agent.terms import NO_TERMS, Terms, terms_of


def test_a_request_that_says_nothing_has_no_terms() -> None:
    assert terms_of({}) == NO_TERMS


def test_words_of_a_body_and_of_properties_mean_the_same() -> None:
    body = {"privacy": "site", "priority": 1, "accept_provisional": True, "deferrable": 1}
    properties = {"privacy": "site", "priority": "1", "accept_provisional": "1", "deferrable": "1"}
    assert terms_of(body, client="camera") == terms_of(properties, client="camera")
    assert terms_of(body) == Terms("", "site", 1, accepts_provisional=True, is_deferrable=True)


@pytest.mark.parametrize("priority", [-1, 101, "1.5", "", "9999", "first", True, None])
def test_a_priority_that_is_none_is_refused(priority: object) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        terms_of({"priority": priority})


@pytest.mark.parametrize("name", ["accept_provisional", "deferrable"])
@pytest.mark.parametrize("value", ["yes", "2", 0.5, ""])
def test_a_flag_that_is_neither_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=name):
        terms_of({name: value})
