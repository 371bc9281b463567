"""The operator's REST for the audit record: reading it, and looking whether it is whole."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AwareDatetime

from controller.api import audit_views as views
from controller.api.http_bodies import BoundedRoute
from controller.audit.model import Entry, Filter, Head, Verification
from controller.audit.service import Audit
from core.errors import InvalidRequest

PREFIX = "/api"
# Derived: SQLite's integers have 64 bits.
_MAX_ID = (1 << 63) - 1

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}

EntryId = Annotated[int | None, Query(ge=1, le=_MAX_ID)]
ActionText = Annotated[
    str | None, Query(max_length=64, description="An action; with a dot at its end, all that begin so.")
]
NameText = Annotated[str | None, Query(max_length=256)]


def router(audit: Audit) -> APIRouter:
    """Return the endpoints about the record, below /api."""
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute, tags=["audit"])
    face = _Record(audit)
    api.add_api_route("/audit", face.entries, summary="List who changed what, the newest first")
    api.add_api_route("/audit/verification", face.verify, summary="Follow the chain of the whole record")
    return api


class _Record:
    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    async def entries(
        self,
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
        before: EntryId = None,
        operator: NameText = None,
        action: ActionText = None,
        target: NameText = None,
        since: AwareDatetime | None = None,
    ) -> views.AuditView:
        wanted = Filter(limit, before, operator, action, target, since)
        page = await self._audit.entries(wanted)
        return views.AuditView(entries=tuple(map(_entry_view, page.entries)), next=page.next_before)

    async def verify(
        self,
        head_id: EntryId = None,
        head_sha256: Annotated[str | None, Query(pattern="^[0-9a-f]{64}$")] = None,
    ) -> views.AuditVerificationView:
        """With a head noted down before, look also whether that entry is what it was."""
        if (head_id is None) is not (head_sha256 is None):
            raise InvalidRequest("verification: expected head_id and head_sha256 together, got one of them")
        noted = None if head_id is None or head_sha256 is None else Head(head_id, head_sha256)
        return _verification_view(await self._audit.verify(noted))


def _entry_view(entry: Entry) -> views.AuditEntryView:
    act, actor, result = entry.act, entry.act.actor, entry.result
    return views.AuditEntryView(
        id=entry.id,
        at=entry.at,
        operator=actor.name,
        role=actor.role,
        action=act.action,
        target=act.target,
        outcome=result.outcome.value,
        code=result.code,
        detail=act.detail,
        source=actor.source,
    )


def _verification_view(found: Verification) -> views.AuditVerificationView:
    return views.AuditVerificationView(
        entries=found.entries,
        first=_head_view(found.first),
        last=_head_view(found.last),
        problem=found.problem,
        broken_at=found.broken_at,
    )


def _head_view(head: Head | None) -> views.AuditHeadView | None:
    return None if head is None else views.AuditHeadView(id=head.id, sha256=head.sha256)
