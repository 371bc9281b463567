"""What a caller says beside its request: who it is, how urgent it is, where its data may go, what it makes do with.

The words are the same on every face (wire contract, section 2.2): user properties of MQTT 5, `parameters` of an Open
Inference body elsewhere, with `_` in the place of `-`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from core.errors import InvalidRequest

# Chosen: more levels than anybody tells apart.
MAX_PRIORITY = 100
_NO = ("0", "false", "False")
_YES = ("1", "true", "True")


class Terms(NamedTuple):
    # Empty on a face that does not know its callers.
    client: str = ""
    # A word that may be no class at all: whoever needs the class refuses then.
    privacy: str | None = None
    # 1 is the highest, 0 says nothing (schedule-policy extension of the Open Inference Protocol).
    priority: int = 0
    # Wants the edge's answer at once, and the heavy tier's later under the same correlation.
    accepts_provisional: bool = False
    # The heavy tier's verdict is of use even hours later, when it is away now.
    is_deferrable: bool = False


NO_TERMS = Terms()


def terms_of(words: Mapping[str, object], *, client: str = "") -> Terms:
    """Return what `words`, named as in an Open Inference body, say.

    Raises:
        InvalidRequest: a word has no meaning here.
    """
    if not words:
        return Terms(client) if client else NO_TERMS
    privacy = words.get("privacy")
    return Terms(
        client,
        None if privacy is None else str(privacy),
        _priority(words.get("priority", 0)),
        _flag(words, "accept_provisional"),
        _flag(words, "deferrable"),
    )


def _priority(value: object) -> int:
    text = str(value)
    if not text.isdecimal() or len(text) > 3 or int(text) > MAX_PRIORITY:
        raise InvalidRequest(f"priority: expected 1 (first) to {MAX_PRIORITY}, or 0 for the default, got {text[:80]!r}")
    return int(text)


def _flag(words: Mapping[str, object], name: str) -> bool:
    text = str(words.get(name, "0"))
    if text not in _YES and text not in _NO:
        raise InvalidRequest(f"{name}: expected 0 or 1, got {text[:80]!r}")
    return text in _YES
