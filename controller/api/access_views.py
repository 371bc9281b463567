"""The bodies of what is about operators and sessions, as the client and the server both know them.

Kept as light as `operator_views`, because the command line imports it.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.ids import Name

RoleText = Literal["viewer", "operator", "admin"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class OperatorBody(_Body):
    name: Name
    role: RoleText


class SignInBody(_Body):
    secret: Annotated[str, Field(max_length=256)]


class OperatorView(_View):
    name: str
    role: RoleText
    created_at: datetime


class OperatorsView(_View):
    operators: tuple[OperatorView, ...]


class IssuedSecretView(_View):
    operator: OperatorView
    secret: str
    """Shown this once; what is stored is its hash."""


class SessionView(_View):
    csrf_token: str
    """To be repeated in X-CSRF-Token by every request that changes something."""
    expires_at: datetime
    """When it ends unless it is used meanwhile."""


class MeView(_View):
    name: str
    role: RoleText
    session: SessionView | None
    """None for who sends a secret with every request."""
