"""A name needs no escaping in a topic, a URL, a path or a span attribute."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidName
from core.ids import checked_name
from tests.support.open_inference_strategies import PATIENT


@pytest.mark.parametrize("name", ["a", "7", "cam-1.north_2", "A" * 64])
def test_a_well_formed_name_is_returned(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "_a", "a/b", "a+b", "#", "a b", "a\n", "é", "a" * 65, "..", "\x00"])
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidName, match="camera: expected"):
        checked_name(name, kind="camera")


@PATIENT
@given(st.text(max_size=80))
def test_what_is_accepted_needs_no_escaping_anywhere(name: str) -> None:
    try:
        checked_name(name)
    except InvalidName:
        return
    assert re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)
    assert name[0].isalnum()
