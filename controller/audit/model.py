"""The values of the record: who, what, to which, and how it ended."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

# Chosen: enough for a sentence; what a peer writes is cut, so that nobody fills the disk with one entry.
MAX_TEXT_CHARS = 256


class Outcome(StrEnum):
    OK = "ok"
    REFUSED = "refused"
    """Asked for, and nothing was changed."""
    FAILED = "failed"
    """A defect or a fault of ours, or the process ended meanwhile: what was changed is not known."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts. No operator's name has parentheses, so none can pose as one of those below."""

    name: str
    role: str
    # Network address that the request came from; empty for what needed none.
    source: str = ""


CONTROLLER = Actor("(controller)", "controller")
"""What the controller decides by itself."""
CONSOLE = Actor("(console)", "owner")
"""Whoever may write data_dir, on the controller's machine."""
UNKNOWN_NAME, UNKNOWN_ROLE = "(unknown)", "none"


def nobody(source: str) -> Actor:
    """Return who showed no credential, or none that is known."""
    return Actor(UNKNOWN_NAME, UNKNOWN_ROLE, source)


@dataclass(frozen=True, slots=True)
class Act:
    """Something that somebody asks for. `detail` has no secrets and no payloads."""

    actor: Actor
    # Noun and verb, as in `deployment.put`.
    action: str
    target: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class OpenAct:
    """An act whose end is not known yet."""

    id: int
    at: datetime
    act: Act


@dataclass(frozen=True, slots=True)
class Result:
    outcome: Outcome
    # Our error code, or `interrupted`; empty when all is well.
    code: str = ""


OK = Result(Outcome.OK)
INTERRUPTED = Result(Outcome.FAILED, "interrupted")


@dataclass(frozen=True, slots=True)
class Entry:
    """One link of the chain. Ids are counted without gaps, from 1."""

    id: int
    at: datetime
    act: Act
    result: Result
    # Hexadecimal; that of the first entry ever is NO_ENTRY_SHA256.
    previous_sha256: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Head:
    """An entry and its hash: noted down elsewhere, it proves later that nothing up to it was changed."""

    id: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Filter:
    """What is asked for; None stands for any. The newest come first."""

    limit: int
    # Only entries with a smaller id.
    before: int | None = None
    operator: str | None = None
    # A whole action, or all that begin with it when it ends with a dot: `agent.`.
    action: str | None = None
    target: str | None = None
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """`next_before` is the `before` of the page of older entries; None: there are none."""

    entries: tuple[Entry, ...]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class Verification:
    """What a look at the whole chain found; `problem` is None when every link holds."""

    entries: int
    first: Head | None
    last: Head | None
    problem: str | None = None
    # Where the chain breaks.
    broken_at: int | None = None
