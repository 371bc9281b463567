"""Operators, what they may do, and the browser sessions they have open."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import total_ordering


@total_ordering
class OperatorRole(Enum):
    """In ascending order: each may do everything that those before it may."""

    VIEWER = "viewer"
    """Sees everything and may ask models."""
    OPERATOR = "operator"
    """Publishes and deploys models, lets agents in."""
    ADMIN = "admin"
    """Manages operators and keys."""

    def __lt__(self, other: "OperatorRole") -> bool:
        ascending = tuple(OperatorRole)
        return ascending.index(self) < ascending.index(other)


@dataclass(frozen=True, slots=True)
class Operator:
    name: str
    role: OperatorRole
    # Hexadecimal. The secret has 256 random bits: nothing can be guessed from its hash, however fast the hash is.
    secret_sha256: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class BrowserSession:
    token_sha256: str
    operator: str
    # Repeated by every request that changes something: a page from elsewhere cannot read it.
    csrf_token: str
    created_at: datetime
    # Moves on with use.
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; without a session it showed its secret itself."""

    operator: Operator
    session: BrowserSession | None = None
