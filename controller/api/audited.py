"""Every change that an operator asks for leaves a record, whatever comes of it.

    request ─▶ open act, stored ─▶ the face ─▶ status ─▶ entry: ok (below 400), refused (4xx), failed (5xx) ─▶ answer

The entry is durable before the answer leaves. A request that cannot be recorded is refused and changes nothing. What
its body names, the endpoint says itself, by `describe`, before it changes anything. Stands behind
`controller.api.access.Guarded`, which has proven who asks.
"""

import logging

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.access.model import Caller, Operator
from controller.api.audited_actions import asked_by
from controller.api.problems import problem_answer
from controller.audit.model import OK, Act, Actor, Outcome, Result, nobody
from controller.audit.service import Audit, OpenRecord
from core.errors import InternalError, NanofleetError
from core.status import STATUS, error_from_http

_log = logging.getLogger(__name__)

_STATE_KEY = "audit"


class Audited:
    """Hands every request to `app` and records those that change something."""

    def __init__(self, app: ASGIApp, audit: Audit) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = asked_by(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if asked is None:
            await self._app(scope, receive, send)
            return
        try:
            record = await self._audit.begin(Act(_actor(scope), *asked))
        except NanofleetError as error:
            await problem_answer(STATUS[error.code].http, error, {})(scope, receive, send)
            return
        await self._recorded(record, scope, receive, send)

    async def _recorded(self, record: OpenRecord, scope: Scope, receive: Receive, send: Send) -> None:
        has_ended = False

        async def send_after_record(message: Message) -> None:
            nonlocal has_ended
            if message["type"] == "http.response.start" and not has_ended:
                has_ended = True
                await _end(record, _result(message["status"]))
            await send(message)

        scope["state"][_STATE_KEY] = record
        # Cancelled, it stays open: nobody knows what was done, and the next start says so.
        try:
            await self._app(scope, receive, send_after_record)
        except Exception:
            if not has_ended:
                await _end(record, Result(Outcome.FAILED, InternalError.code.value))
            raise


class AccessWitness:
    """Records what `Access` tells: who signed in and out, and credentials that are nobody's."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    def signed_in(self, operator: Operator, *, source: str) -> None:
        self._audit.report(Act(actor_of(operator, source=source), "session.open"))

    def signed_out(self, operator: str) -> None:
        self._audit.report(Act(Actor(operator, ""), "session.close"))

    def refused(self, error: NanofleetError, *, source: str) -> None:
        self._audit.refused(nobody(source), "credential.show", target="", error=error)


async def describe(request: Request, *, target: str | None = None, detail: str | None = None) -> None:
    """Say, durably, what the body of a request asks for, before it is done."""
    if (record := _record_of(request)) is not None:
        await record.describe(target=target, detail=detail)


def add(request: Request, *, target: str | None = None, detail: str | None = None) -> None:
    """Say what came of a request, for the entry that will be."""
    if (record := _record_of(request)) is not None:
        record.add(target=target, detail=detail)


def actor_of(operator: Operator, *, source: str) -> Actor:
    return Actor(operator.name, operator.role.value, source)


def _record_of(request: Request) -> OpenRecord | None:
    """Return the open record; None where the application stands alone, without those in front of it."""
    record = request.scope.get("state", {}).get(_STATE_KEY)
    return record if isinstance(record, OpenRecord) else None


def _actor(scope: Scope) -> Actor:
    caller, client = scope["state"]["caller"], scope.get("client")
    assert isinstance(caller, Caller), "what changes something is never open to anybody"
    return actor_of(caller.operator, source="unknown" if client is None else str(client[0]))


def _result(status: int) -> Result:
    if status < 400:
        return OK
    outcome = Outcome.REFUSED if status < 500 else Outcome.FAILED
    return Result(outcome, error_from_http(status, "").code.value)


async def _end(record: OpenRecord, result: Result) -> None:
    try:
        await record.end(result)
    except NanofleetError as error:
        # The change is made or not, and its caller must learn which; the open act stays as a trace.
        _log.error("audit entry could not be completed", extra={"action": record.act.action}, exc_info=error)
