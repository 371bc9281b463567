"""Selection: which hard examples are kept, by virtual time and given chance."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.samples.rules import HOUR_S, MAX_MODELS, Candidate, Keep, Refusal, Rules, Selection

RULES = Rules(max_below=0.3, max_above=0.1, max_per_class=3, max_per_hour=8)


def selection(rules: Rules = RULES, *, seed: int = 1) -> Selection:
    return Selection(rules, below=Random(seed).randrange)


def candidate(label: int | None = 0, *, confidence: float | None = 0.7, model: str = "digits") -> Candidate:
    return Candidate(model, label, confidence, 0.8)


def kept_after(choices: list[Keep | Refusal], labels: list[int]) -> dict[int, int]:
    """Return the label of every ticket that is still kept."""
    kept: dict[int, int] = {}
    for choice, label in zip(choices, labels, strict=True):
        if isinstance(choice, Keep):
            if choice.replaces is not None:
                del kept[choice.replaces]
            kept[choice.ticket] = label
    return kept


@pytest.mark.parametrize(
    ("confidence", "is_kept"), [(0.79, True), (0.51, True), (0.45, False), (0.85, True), (0.95, False)]
)
def test_only_what_is_near_the_threshold_is_kept(confidence: float, is_kept: bool) -> None:
    choice = selection().consider(candidate(confidence=confidence), now_s=0.0)
    assert isinstance(choice, Keep) is is_kept
    assert is_kept or choice is Refusal.NOT_NEAR


def test_a_flawed_answer_is_kept_although_it_has_no_confidence() -> None:
    assert isinstance(selection().consider(candidate(None, confidence=None), now_s=0.0), Keep)


@given(
    labels=st.lists(st.integers(0, 5), max_size=200),
    per_class=st.integers(1, 5),
    per_hour=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_within_an_hour_neither_limit_is_ever_passed(
    labels: list[int], per_class: int, per_hour: int, seed: int
) -> None:
    chooser = selection(Rules(1.0, 0.0, per_class, per_hour), seed=seed)
    choices: list[Keep | Refusal] = []
    for number, label in enumerate(labels):
        choices.append(chooser.consider(candidate(label), now_s=float(number)))
        kept = Counter(kept_after(choices, labels[: number + 1]).values())
        assert kept.total() <= per_hour
        assert max(kept.values(), default=0) <= per_class


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=100), seed=st.integers(0, 1000))
def test_no_ticket_is_given_twice_and_only_one_that_is_kept_is_replaced(labels: list[int], seed: int) -> None:
    chooser = selection(seed=seed)
    choices = [chooser.consider(candidate(label), now_s=1.0) for label in labels]
    tickets = [choice.ticket for choice in choices if isinstance(choice, Keep)]
    assert len(set(tickets)) == len(tickets)
    # Raises KeyError for a ticket that is not kept.
    kept_after(choices, labels)


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=200), seed=st.integers(0, 1000))
def test_every_class_that_was_seen_is_kept_when_there_is_room_for_one_of_each(labels: list[int], seed: int) -> None:
    chooser = selection(Rules(1.0, 0.0, 5, 8), seed=seed)
    choices = [chooser.consider(candidate(label), now_s=1.0) for label in labels]
    assert set(kept_after(choices, labels).values()) == set(labels)


def test_a_rare_class_displaces_the_most_numerous_one_when_the_hour_is_full() -> None:
    chooser = selection(Rules(1.0, 0.0, 8, 8))
    labels = [0] * 8 + [1] * 4
    choices = [chooser.consider(candidate(label), now_s=1.0) for label in labels]
    assert Counter(kept_after(choices, labels).values()) == {0: 4, 1: 4}


def test_within_an_hour_early_and_late_examples_of_a_class_have_the_same_chance() -> None:
    kept: Counter[int] = Counter()
    for seed in range(3000):
        chooser = selection(Rules(1.0, 0.0, 3, 8), seed=seed)
        numbers = list(range(12))
        choices = [chooser.consider(candidate(), now_s=float(number)) for number in numbers]
        kept.update(kept_after(choices, numbers).values())
    # 3 of 12 in 3000 hours: 750 each, with a standard deviation of 24.
    assert all(abs(kept[number] - 750) < 120 for number in range(12))


def test_a_new_hour_has_limits_of_its_own() -> None:
    chooser = selection()
    first = [chooser.consider(candidate(), now_s=0.0) for _ in range(3)]
    later = [chooser.consider(candidate(), now_s=HOUR_S) for _ in range(3)]
    assert all(isinstance(choice, Keep) and choice.replaces is None for choice in (*first, *later))


def test_a_class_beyond_its_limit_is_refused_by_that_name() -> None:
    chooser = Selection(RULES, below=lambda bound: bound - 1)
    choices = [chooser.consider(candidate(), now_s=0.0) for _ in range(4)]
    assert choices[-1] is Refusal.CLASS_LIMIT


def test_a_new_class_in_a_full_and_balanced_hour_is_refused_by_that_name() -> None:
    chooser = selection(Rules(1.0, 0.0, 1, 2))
    choices = [chooser.consider(candidate(label), now_s=0.0) for label in range(3)]
    assert choices[-1] is Refusal.HOUR_LIMIT


def test_models_have_hours_of_their_own_and_their_number_is_bounded() -> None:
    chooser = selection(Rules(1.0, 0.0, 1, 1))
    for number in range(MAX_MODELS + 1):
        assert isinstance(chooser.consider(candidate(model=f"m{number}"), now_s=0.0), Keep)
    # The first was forgotten for the last.
    assert isinstance(chooser.consider(candidate(model="m0"), now_s=0.0), Keep)
    assert chooser.consider(candidate(1, model=f"m{MAX_MODELS}"), now_s=0.0) is Refusal.HOUR_LIMIT
