"""The bodies of the audit record, as the client and the server both know them; as light as `operator_views`."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

OutcomeText = Literal["ok", "refused", "failed"]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class AuditEntryView(_View):
    id: int
    at: datetime
    operator: str
    """Name of an operator; in parentheses who is none: `(controller)`, `(console)`, `(unknown)`."""
    role: str
    action: str
    """Noun and verb, such as `deployment.put`."""
    target: str
    outcome: OutcomeText
    code: str
    """Why it was refused or failed; empty when it is ok."""
    detail: str
    source: str
    """Network address that the request came from; empty for what needed none."""


class AuditView(_View):
    entries: tuple[AuditEntryView, ...]
    """The newest first."""
    next: int | None
    """`before` of the page of older entries; null: there are none."""


class AuditHeadView(_View):
    id: int
    sha256: str


class AuditVerificationView(_View):
    entries: int
    """How many were found in order."""
    first: AuditHeadView | None
    last: AuditHeadView | None
    """To be noted elsewhere: asked for later, it proves that nothing up to it was changed."""
    problem: str | None
    """What is wrong; null: every link holds."""
    broken_at: int | None
    """Entry at which the chain breaks."""
