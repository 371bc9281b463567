"""The browser's half of a session: its cookie, and how a request proves that our own page made it.

The cookie is out of reach for scripts (HttpOnly) and does not go with what pages from elsewhere start
(SameSite=Strict). Over TLS its name has the prefix `__Host-`, with which browsers accept it only from this host, over
TLS, for every path; so nothing on a neighbouring host or in clear can plant one (RFC 6265bis, section 4.1.3).

A page from elsewhere cannot read the session's CSRF token, nor choose what `Origin` and `Sec-Fetch-Site` say.
"""

import hmac

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from controller.access.model import BrowserSession
from controller.access.service import SESSION_LIFETIME
from core.errors import Forbidden

CSRF_HEADER = "x-csrf-token"
SAFE_METHODS = frozenset({"GET", "HEAD"})
_NAME = "nanofleet-session"
# Chosen: far above what one browser keeps for one host.
_MAX_COOKIE_CHARS = 8192


def is_tls(scope: Scope) -> bool:
    return scope.get("scheme") == "https"


def cookie_name(scope: Scope) -> str:
    return f"__Host-{_NAME}" if is_tls(scope) else _NAME


def session_token(scope: Scope) -> str | None:
    """Return the token in the request's cookie; None when there is not exactly one."""
    cookies = "; ".join(Headers(scope=scope).getlist("cookie"))
    if len(cookies) > _MAX_COOKIE_CHARS:
        return None
    wanted = cookie_name(scope)
    pairs = (pair.strip().partition("=") for pair in cookies.split(";"))
    # Two of one name mean that somebody planted one.
    found = [value for name, _, value in pairs if name == wanted]
    return found[0] if len(found) == 1 else None


def set_session(response: Response, scope: Scope, token: str) -> None:
    response.set_cookie(
        cookie_name(scope),
        token,
        max_age=int(SESSION_LIFETIME.total_seconds()),
        path="/",
        secure=is_tls(scope),
        httponly=True,
        samesite="strict",
    )


def clear_session(response: Response, scope: Scope) -> None:
    response.delete_cookie(cookie_name(scope), path="/", secure=is_tls(scope), httponly=True, samesite="strict")


def check_csrf_token(session: BrowserSession, given: str) -> None:
    """Raise Forbidden unless `given` is the session's token."""
    if not hmac.compare_digest(session.csrf_token.encode(), given.encode(errors="surrogatepass")):
        raise Forbidden(
            "X-CSRF-Token: expected the token of this session, as GET /api/me says it; programs send "
            "`Authorization: Bearer` instead of a cookie and need none"
        )


def check_own_page(scope: Scope, *, is_proof_needed: bool) -> None:
    """Refuse a request that a page from elsewhere made a browser send.

    Args:
        is_proof_needed: refuse also what does not say where it is from, as programs do.

    Raises:
        Forbidden: it is not from a page of ours.
    """
    headers = Headers(scope=scope)
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}".lower()
    if origin is not None and origin.lower() != own:
        raise Forbidden(f"Origin: expected {own[:200]!r}, a page of this controller, got {origin[:200]!r}")
    if site is not None and site != "same-origin":
        raise Forbidden(f"Sec-Fetch-Site: expected 'same-origin', a page of this controller, got {site[:40]!r}")
    if is_proof_needed and origin is None and site is None:
        raise Forbidden("Origin: expected that of this controller, got none; programs send `Authorization: Bearer`")
