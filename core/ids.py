"""Names of things, as distinct types, and the one rule for what a name may look like.

A name becomes a topic segment, a URL path segment, a file name and a span attribute, so it is kept to a small alphabet
that needs no escaping in any of them: it starts with a letter or digit and has at most 64 characters.
"""

import re
from typing import Annotated, NewType

from pydantic import AfterValidator, Field

from core.errors import InvalidName, InvalidRequest

AgentId = NewType("AgentId", str)
SiteId = NewType("SiteId", str)
ClientId = NewType("ClientId", str)
ModelName = NewType("ModelName", str)
VariantName = NewType("VariantName", str)

# Chosen: MQTT wildcards, path separators, dots in front and white space are all out.
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ANY_AGENT = AgentId("any")
_PULL_ID = re.compile(r"[0-9a-f]{32}")


def checked_name(value: str, *, kind: str = "name") -> str:
    """Return `value` if it is a well-formed name.

    Raises:
        InvalidName: it is not.
    """
    if NAME_PATTERN.fullmatch(value) is None:
        raise InvalidName(
            f"{kind}: expected a letter or digit, then up to 63 letters, digits, '.', '_' or '-', got {value[:80]!r}"
        )
    return value


def checked_pull_id(text: str) -> str:
    """Return the id of a pull.

    Raises:
        InvalidRequest: it is none.
    """
    if _PULL_ID.fullmatch(text) is None:
        raise InvalidRequest(f"pull: expected 32 hexadecimal digits, got {text[:80]!r}")
    return text


def _valid(value: str) -> str:
    try:
        return checked_name(value)
    except InvalidName as error:
        raise ValueError(str(error)) from error


# For pydantic models at the edges.
Name = Annotated[str, AfterValidator(_valid)]
# What an agent says of its machine, such as `arch:x86_64`.
Tag = Annotated[str, Field(min_length=1, max_length=128)]
