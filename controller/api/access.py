"""Who may ask what of the HTTP port: the one gate in front of every face.

    request ─▶ rule (access_rules) ─ open ────────────────────────────────────────────▶ the face
                     │
                     ├─ Authorization: Bearer nfo1.… ─▶ operator ─▶ role ─────────────▶ the face
                     └─ session cookie ─▶ operator ─▶ role ─▶ CSRF token and Origin ──▶ the face

What the table does not name is not served, so a route that somebody forgot to enter is closed, not open. The face finds
the caller by `caller_of`. Answers that refuse have the shape of the face: {"error": …} below /v2, problem details
elsewhere; a page that nobody is signed in for leads to /sign-in and back. Pure ASGI: bodies stream through untouched.

Since every request needs a credential of its own, the name in Host does not matter: a page that points its host name at
this machine ("DNS rebinding") has no cookie of ours under that name.
"""

import logging
from urllib.parse import quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.access.attempts import REFILL_S
from controller.access.model import Caller, OperatorRole
from controller.access.service import Access
from controller.api.access_cookies import CSRF_HEADER, SAFE_METHODS, check_csrf_token, check_own_page, session_token
from controller.api.access_rules import Nobody, is_inference, is_page, methods_of, need
from controller.api.audited import actor_of
from controller.api.audited_actions import Asked, asked_by
from controller.api.problems import open_inference_answer, problem_answer
from controller.audit.service import Audit
from core.errors import Forbidden, InvalidRequest, NanofleetError, NotFound, Overloaded, Unauthenticated
from core.logs import peer_text
from core.status import STATUS

_log = logging.getLogger(__name__)

SIGN_IN_PATH = "/sign-in"
CHALLENGE = 'Bearer realm="nanofleet"'
# For pages; what a page needs beyond that it says itself.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    # Not `no-referrer`: with it, forms would be sent with `Origin: null`.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
_STATE_KEY = "caller"


class Guarded:
    """Lets through to `app` who may ask what it asks."""

    def __init__(self, app: ASGIApp, access: Access, audit: Audit) -> None:
        self._app = app
        self._access = access
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._serve(scope, receive, send)
            case "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": "not served"})
            case _:
                await self._app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_inference(scope["path"]):
            send = _hardened(send)
        try:
            admitted = await self._admitted(scope)
        except NanofleetError as error:
            answer = _to_sign_in(scope) if _wants_sign_in(scope, error) else _refusal(scope, error)
            await answer(scope, receive, send)
            return
        await self._app(admitted, receive, send)

    async def _admitted(self, scope: Scope) -> Scope:
        """Return the scope with the caller in it.

        Raises:
            Unauthenticated, Overloaded: no credential, or none that is good.
            Forbidden: another role is needed, or a browser sends it for a page that is not ours.
            NotFound, InvalidRequest: no such endpoint, or not for this method.
        """
        method, path = scope["method"], scope["path"]
        needed = need(method, path)
        if needed is Nobody.OPEN:
            return scope
        caller = await self._caller(scope)
        if needed is None:
            raise _unknown(method, path)
        try:
            _check_role(caller, needed)
            if caller.session is not None and method not in SAFE_METHODS:
                check_own_page(scope, is_proof_needed=True)
                check_csrf_token(caller.session, Headers(scope=scope).get(CSRF_HEADER, ""))
        except Forbidden as error:
            self._record_refusal(caller, scope, error)
            raise
        if method not in SAFE_METHODS and not is_inference(path):
            _log.info(
                "operator asks for a change",
                extra={"operator": caller.operator.name, "method": method, "path": peer_text(path)},
            )
        return {**scope, "state": {**scope.get("state", {}), _STATE_KEY: caller}}

    def _record_refusal(self, caller: Caller, scope: Scope, error: Forbidden) -> None:
        """Record that somebody wanted what is not theirs, under the name of that."""
        method, path = scope["method"], scope["path"]
        asked = asked_by(method, path) or Asked(method.lower(), peer_text(path))
        actor = actor_of(caller.operator, source=source_of(scope))
        self._audit.refused(actor, asked.action, target=asked.target, error=error)

    async def _caller(self, scope: Scope) -> Caller:
        authorization, source = Headers(scope=scope).getlist("authorization"), source_of(scope)
        token = session_token(scope)
        if authorization:
            return Caller(await self._access.authenticate(_bearer(authorization), source=source))
        if token is not None:
            return await self._access.resume(token, source=source)
        raise Unauthenticated(
            "credential: expected `Authorization: Bearer` with an operator's secret, got none; on the command line "
            "name its file with --credential, in a browser sign in at /sign-in"
        )


def caller_of(request: Request) -> Caller:
    """Return who sent a request that came through `Guarded`."""
    caller = request.scope.get("state", {}).get(_STATE_KEY)
    if not isinstance(caller, Caller):
        raise Unauthenticated("credential: expected one, got none; sign in at /sign-in")
    return caller


def source_of(scope: Scope) -> str:
    """Return the network address that a request came from."""
    client = scope.get("client")
    return "unknown" if client is None else str(client[0])


def _bearer(authorization: list[str]) -> str:
    # RFC 9110, section 11.1: the scheme's case does not matter. RFC 6750, section 2: one way, one credential.
    scheme, _, secret = authorization[0].strip().partition(" ")
    if len(authorization) > 1 or scheme.lower() != "bearer":
        raise Unauthenticated("Authorization: expected `Bearer` and an operator's secret, once")
    return secret.strip()


def _check_role(caller: Caller, needed: OperatorRole) -> None:
    operator = caller.operator
    if operator.role < needed:
        raise Forbidden(
            f"operator {operator.name}: expected the role {needed.value} for this, got {operator.role.value}; "
            "ask an admin for a credential with that role"
        )


class _MethodNotAllowed(InvalidRequest):
    def __init__(self, method: str, allowed: frozenset[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"method: expected {self.allowed}, got {peer_text(method)}")


def _unknown(method: str, path: str) -> NanofleetError:
    if allowed := methods_of(path):
        return _MethodNotAllowed(method, allowed)
    return NotFound(f"{peer_text(path)}: nothing is served here; see /api/openapi.json for what is")


def _wants_sign_in(scope: Scope, error: NanofleetError) -> bool:
    return (
        isinstance(error, Unauthenticated)
        and is_page(scope["method"], scope["path"])
        and "authorization" not in Headers(scope=scope)
    )


def _to_sign_in(scope: Scope) -> Response:
    """Lead a browser to the page to sign in on, which leads back to where it wanted to go."""
    wanted = quote(scope["path"])
    if query := scope.get("query_string", b"").decode("latin-1"):
        wanted += f"?{query}"
    return RedirectResponse(f"{SIGN_IN_PATH}?{urlencode({'next': wanted})}", 303)


def _refusal(scope: Scope, error: NanofleetError) -> Response:
    answer = open_inference_answer if is_inference(scope["path"]) else problem_answer
    match error:
        case Unauthenticated():
            return answer(STATUS[error.code].http, error, {"www-authenticate": CHALLENGE})
        case Overloaded():
            return answer(STATUS[error.code].http, error, {"retry-after": f"{REFILL_S:.0f}"})
        case _MethodNotAllowed():
            return answer(405, error, {"allow": error.allowed})
        case _:
            return answer(STATUS[error.code].http, error, {})


def _hardened(send: Send) -> Send:
    """Return `send`, made to say how browsers must treat an answer, unless the answer says so itself."""

    async def send_hardened(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            headers.setdefault("x-content-type-options", "nosniff")
            # Answers are for who asked; a cache does not ask who that is.
            headers.setdefault("cache-control", "no-store")
            if headers.get("content-type", "").startswith("text/html"):
                for name, value in _PAGE_HEADERS.items():
                    headers.setdefault(name, value)
            message = {**message, "headers": headers.raw}
        await send(message)

    return send_hardened
