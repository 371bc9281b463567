"""The page on which a person signs in with a browser: a form that needs no scripts.

    GET  /sign-in    the form, or who is signed in
    POST /sign-in    secret ─▶ session cookie ─▶ the page that was asked for first (`next`), or the overview
    POST /sign-out   the session ends ─▶ back to GET

`controller.api.operators_rest` has the same for programs in the page.
"""

from html import escape
from string import Template
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from controller.access.model import Caller
from controller.access.service import Access
from controller.api.access import SIGN_IN_PATH, source_of
from controller.api.access_cookies import (
    check_csrf_token,
    check_own_page,
    clear_session,
    session_token,
    set_session,
)
from controller.api.http_bodies import read_body
from core.errors import Forbidden, InvalidRequest, NanofleetError, Overloaded, Unauthenticated
from core.status import STATUS

PATH = SIGN_IN_PATH
SIGN_OUT_PATH = "/sign-out"
_MAX_FORM_BYTES = 4096
_MAX_FIELDS = 4
# Chosen: far above any address of ours.
_MAX_NEXT_CHARS = 1024
HOME = "/"

_PAGE = Template(
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sign in · nanofleet</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<link rel="icon" href="/assets/mark.svg" type="image/svg+xml">'
    '<link rel="stylesheet" href="/assets/dashboard.css"><script src="/assets/theme.js"></script></head>'
    '<body class="sign-in"><main><h1 class="brand"><img src="/assets/mark.svg" alt="" width="26" height="26">nanofleet'
    "</h1>$content</main></body></html>"
)
_FORM = Template(
    '<p role="status"$tone>$message</p>'
    f'<form method="post" action="{PATH}"><label for="secret">Secret of your credential'
    '<input id="secret" name="secret" type="password" autocomplete="current-password" required autofocus></label>'
    '<input type="hidden" name="next" value="$next">'
    "<button>Sign in</button></form>"
    '<p class="muted">An admin makes one: <code>nanofleet operators add</code></p>'
)
_SIGNED_IN = Template(
    '<p role="status">Signed in as <strong>$name</strong> ($role).</p><p><a href="$next">Go on</a></p>'
    f'<form method="post" action="{SIGN_OUT_PATH}"><input type="hidden" name="csrf_token" value="$csrf_token">'
    "<button>Sign out</button></form>"
)
_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "img-src 'self'; script-src 'self'; style-src 'self'"
)


def pages(access: Access) -> APIRouter:
    """Return the endpoints of the page."""
    router = APIRouter(include_in_schema=False)
    page = _SignIn(access)
    router.add_api_route(PATH, page.show, methods=["GET"], response_model=None)
    router.add_api_route(PATH, page.sign_in, methods=["POST"], response_model=None)
    router.add_api_route(SIGN_OUT_PATH, page.sign_out, methods=["POST"], response_model=None)
    return router


class _SignIn:
    def __init__(self, access: Access) -> None:
        self._access = access

    async def show(self, request: Request) -> Response:
        caller = await self._signed_in(request)
        wanted = own_path(request.query_params.get("next", HOME))
        if caller is None or caller.session is None:
            return _form_page(wanted)
        operator, csrf_token = caller.operator, caller.session.csrf_token
        fields = {"name": operator.name, "role": operator.role.value, "csrf_token": csrf_token, "next": wanted}
        return _page(_SIGNED_IN.substitute({name: escape(text) for name, text in fields.items()}))

    async def sign_in(self, request: Request) -> Response:
        wanted = HOME
        try:
            check_own_page(request.scope, is_proof_needed=False)
            form = await _form(request)
            wanted = own_path(form.get("next", HOME))
            done = await self._access.sign_in(form.get("secret", "").strip(), source=source_of(request.scope))
        except (InvalidRequest, Forbidden, Unauthenticated, Overloaded) as error:
            return _refused(error, wanted)
        response = RedirectResponse(wanted, 303)
        set_session(response, request.scope, done.token)
        return response

    async def sign_out(self, request: Request) -> Response:
        """A form cannot send X-CSRF-Token, so it has the token in a field."""
        response = RedirectResponse(PATH, 303)
        caller = await self._signed_in(request)
        if caller is not None and caller.session is not None:
            try:
                check_own_page(request.scope, is_proof_needed=True)
                check_csrf_token(caller.session, (await _form(request)).get("csrf_token", ""))
            except (InvalidRequest, Forbidden) as error:
                return _refused(error)
            await self._access.sign_out(caller.session)
        clear_session(response, request.scope)
        return response

    async def _signed_in(self, request: Request) -> Caller | None:
        token = session_token(request.scope)
        if token is None:
            return None
        try:
            return await self._access.resume(token, source=source_of(request.scope))
        except (Unauthenticated, Overloaded):
            # Whoever is not signed in gets the form.
            return None


async def _form(request: Request) -> dict[str, str]:
    body = await read_body(request, max_bytes=_MAX_FORM_BYTES)
    try:
        fields = parse_qs(body.decode("ascii"), max_num_fields=_MAX_FIELDS, strict_parsing=True)
    except ValueError as error:
        raise InvalidRequest("form: expected the fields of this page; load it again") from error
    return {name: values[0] for name, values in fields.items()}


def own_path(text: str) -> str:
    """Return `text` when it is the path of a page of this controller, otherwise HOME.

    Browsers take `//host` and `/\\host` for another site, and drop tabs and line ends before they look.
    """
    is_own = (
        len(text) <= _MAX_NEXT_CHARS
        and text.isascii()
        and text.isprintable()
        and text.startswith("/")
        and not text.startswith(("//", "/\\"))
    )
    if not is_own:
        return HOME
    parts = urlsplit(text)
    return quote(parts.path, safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")


def _refused(error: NanofleetError, wanted: str = HOME) -> Response:
    return _form_page(wanted, message=str(error), status=STATUS[error.code].http)


def _form_page(wanted: str, *, message: str = "", status: int = 200) -> Response:
    tone = ' class="notice bad"' if message else ""
    return _page(_FORM.substitute(message=escape(message), next=escape(wanted), tone=tone), status=status)


def _page(content: str, *, status: int = 200) -> Response:
    headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
    return HTMLResponse(_PAGE.substitute(content=content), status, headers)
