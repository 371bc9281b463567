"""The page on which a person signs in with a browser: a form, no scripts.

    GET  /sign-in    the form, or who is signed in
    POST /sign-in    secret ─▶ session cookie ─▶ back to GET
    POST /sign-out   the session ends ─▶ back to GET

`controller.api.operators_rest` has the same for programs in the page.
"""

import base64
import hashlib
from html import escape
from string import Template
from urllib.parse import parse_qs

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from controller.access.model import Caller
from controller.access.service import Access
from controller.api.access import source_of
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

PATH = "/sign-in"
SIGN_OUT_PATH = "/sign-out"
_MAX_FORM_BYTES = 4096
_MAX_FIELDS = 4

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:24rem;margin:15vh auto;padding:0 1rem;color-scheme:light dark}"
    "input,button{font:inherit;width:100%;box-sizing:border-box;padding:.5rem;margin:.5rem 0}"
)
_PAGE = Template(
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>nanofleet</title>'
    f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
    "<body><main><h1>nanofleet</h1>$content</main></body></html>"
)
_FORM = Template(
    '<p role="status">$message</p>'
    f'<form method="post" action="{PATH}"><label for="secret">Secret of your credential</label>'
    '<input id="secret" name="secret" type="password" autocomplete="current-password" required autofocus>'
    "<button>Sign in</button></form>"
)
_SIGNED_IN = Template(
    '<p role="status">Signed in as <strong>$name</strong> ($role).</p>'
    f'<form method="post" action="{SIGN_OUT_PATH}"><input type="hidden" name="csrf_token" value="$csrf_token">'
    "<button>Sign out</button></form>"
)
_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
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
        if caller is None or caller.session is None:
            return _page(_FORM.substitute(message=""))
        operator, csrf_token = caller.operator, caller.session.csrf_token
        fields = {"name": operator.name, "role": operator.role.value, "csrf_token": csrf_token}
        return _page(_SIGNED_IN.substitute({name: escape(text) for name, text in fields.items()}))

    async def sign_in(self, request: Request) -> Response:
        try:
            check_own_page(request.scope, is_proof_needed=False)
            secret = (await _form(request)).get("secret", "").strip()
            done = await self._access.sign_in(secret, source=source_of(request.scope))
        except (InvalidRequest, Forbidden, Unauthenticated, Overloaded) as error:
            return _refused(error)
        response = RedirectResponse(PATH, 303)
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


def _refused(error: NanofleetError) -> Response:
    return _page(_FORM.substitute(message=escape(str(error))), status=STATUS[error.code].http)


def _page(content: str, *, status: int = 200) -> Response:
    headers = {"content-security-policy": _POLICY, "cache-control": "no-store"}
    return HTMLResponse(_PAGE.substitute(content=content), status, headers)
