"""The part of the operator's REST that is about operators: who there is, who asks, and signing browsers in and out.

Behind `controller.api.access.Guarded`, which has proven who asks and that the role suffices.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from controller.access.model import Caller, Operator, OperatorRole
from controller.access.service import Access, IssuedSecret
from controller.api import access_views as views
from controller.api import audited
from controller.api.access import caller_of, source_of
from controller.api.access_cookies import check_own_page, clear_session, set_session
from controller.api.http_bodies import BoundedRoute
from core.errors import InvalidRequest

PREFIX = "/api"

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}

OperatorName = Annotated[str, Path(max_length=64)]


def router(access: Access) -> APIRouter:
    """Return the endpoints about operators and sessions, below /api."""
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute)
    _Operators(access).add_to(api)
    _Sessions(access).add_to(api)
    return api


class _Operators:
    def __init__(self, access: Access) -> None:
        self._access = access

    def add_to(self, api: APIRouter) -> None:
        api.add_api_route("/operators", self.operators, tags=["access"], summary="List the operators")
        api.add_api_route(
            "/operators",
            self.add,
            methods=["POST"],
            status_code=201,
            tags=["access"],
            summary="Add an operator; its secret is shown once",
            responses={409: _REFUSED},
        )
        api.add_api_route(
            "/operators/{name}",
            self.remove,
            methods=["DELETE"],
            status_code=204,
            tags=["access"],
            summary="Remove an operator, but never the last admin",
            responses={404: _REFUSED, 409: _REFUSED},
        )
        api.add_api_route(
            "/operators/{name}/secret",
            self.rotate,
            methods=["POST"],
            tags=["access"],
            summary="Give an operator another secret; its sessions end",
            responses={404: _REFUSED},
        )

    async def operators(self) -> views.OperatorsView:
        return views.OperatorsView(operators=tuple(map(operator_view, await self._access.operators())))

    async def add(self, body: views.OperatorBody, request: Request) -> views.IssuedSecretView:
        await audited.describe(request, target=body.name, detail=f"role {body.role}")
        return _issued_view(await self._access.create(body.name, OperatorRole(body.role)))

    async def remove(self, name: OperatorName) -> None:
        await self._access.remove(name)

    async def rotate(self, name: OperatorName) -> views.IssuedSecretView:
        return _issued_view(await self._access.rotate(name))


class _Sessions:
    def __init__(self, access: Access) -> None:
        self._access = access

    def add_to(self, api: APIRouter) -> None:
        api.add_api_route("/me", self.me, tags=["access"], summary="Say who asks, and by which session")
        api.add_api_route(
            "/sessions",
            self.sign_in,
            methods=["POST"],
            status_code=201,
            tags=["access"],
            summary="Sign a browser in; it gets a cookie",
            responses={401: _REFUSED, 429: _REFUSED},
        )
        api.add_api_route(
            "/sessions/current",
            self.sign_out,
            methods=["DELETE"],
            status_code=204,
            tags=["access"],
            summary="Sign the browser out",
        )

    async def me(self, request: Request) -> views.MeView:
        return _me_view(caller_of(request))

    async def sign_in(self, body: views.SignInBody, request: Request, response: Response) -> views.MeView:
        # Otherwise a page from elsewhere could sign its visitor in as somebody else.
        check_own_page(request.scope, is_proof_needed=False)
        done = await self._access.sign_in(body.secret, source=source_of(request.scope))
        set_session(response, request.scope, done.token)
        return _me_view(Caller(done.operator, done.session))

    async def sign_out(self, request: Request, response: Response) -> None:
        session = caller_of(request).session
        if session is None:
            raise InvalidRequest("session: expected a browser's, got a secret; to end that, rotate it")
        await self._access.sign_out(session)
        clear_session(response, request.scope)


def operator_view(operator: Operator) -> views.OperatorView:
    return views.OperatorView(name=operator.name, role=operator.role.value, created_at=operator.created_at)


def _issued_view(issued: IssuedSecret) -> views.IssuedSecretView:
    return views.IssuedSecretView(operator=operator_view(issued.operator), secret=issued.secret)


def _me_view(caller: Caller) -> views.MeView:
    operator, session = caller.operator, caller.session
    shown = None if session is None else views.SessionView(csrf_token=session.csrf_token, expires_at=session.expires_at)
    return views.MeView(name=operator.name, role=operator.role.value, session=shown)
