"""The bodies of the signing endpoints; light, like `operator_views`, because the command line imports it."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

KeyRoleText = Literal["root", "targets", "snapshot", "timestamp", "director"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class KeyView(_View):
    id: str
    is_here: bool
    """Whether the controller can sign with it at this moment."""


class RoleView(_View):
    role: str
    version: int
    expires_at: datetime
    threshold: int
    """How many of its keys must sign."""
    keys: tuple[KeyView, ...]


class StagedRoleView(_View):
    """The next version of a role, short of signatures."""

    role: str
    version: int
    created_at: datetime
    signatures: int
    threshold: int
    missing_keys: tuple[str, ...]
    """Keys that could still sign it."""


class SigningView(_View):
    roles: tuple[RoleView, ...]
    staged: tuple[StagedRoleView, ...]
    key_places: tuple[str, ...]
    """Where the controller looks for keys."""


class RotationBody(_Body):
    role: KeyRoleText
    replaces: Annotated[str, Field(min_length=4, max_length=64)] | None = None
    """The beginning of the old key's id; none: the first key of the role."""
    public_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The new key, Ed25519 in hexadecimal, when it is kept elsewhere; none: the controller makes one."""


class RotationView(_View):
    role: str
    removed: str
    added: str
    is_published: bool
    """False: it waits for signatures."""


class RevocationBody(_Body):
    """Either `versions` or `below`."""

    versions: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 31)], ...], Field(max_length=1024)] = ()
    below: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    """The first version that stays."""


class RevocationView(_View):
    model: str
    is_published: bool
    """False: it waits for signatures."""
