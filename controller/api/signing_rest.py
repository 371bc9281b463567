"""The operator's REST for signing: status, key rotation, revocation, and metadata on its way to keys elsewhere."""

from typing import Any

from fastapi import APIRouter, Request, Response

from controller.api import audited
from controller.api import signing_views as views
from controller.api.http_bodies import BoundedRoute, read_body
from controller.api.operator_rest import PREFIX
from controller.signing.bundle import MAX_BUNDLE_BYTES, Bundle
from controller.signing.model import KeyRole, PublicKey, RoleStatus, SigningStatus, StagedStatus
from controller.signing.service import Catalogue
from core.ids import ModelName, checked_name

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}
_JSON_BODY = {"requestBody": {"required": True, "content": {"application/json": {}}}}
# TUF metadata is served as it was signed, byte for byte.
_JSON_ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}}}}


class _BundleRoute(BoundedRoute):
    MAX_BODY_BYTES = MAX_BUNDLE_BYTES


def signing_router(catalogue: Catalogue) -> APIRouter:
    """Return every endpoint of signing, below /api."""
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute, tags=["signing"])
    _Signing(catalogue).add_to(api)
    return api


class _Signing:
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def add_to(self, api: APIRouter) -> None:
        add = api.add_api_route
        add("/signing", self.status, summary="Show roles, expiries, keys and what waits for signatures")
        add("/signing/root", self.root, summary="Get the root of trust", responses=_JSON_ANSWER)
        add("/signing/staged", self.staged, summary="Get what waits for signatures", responses=_JSON_ANSWER)
        add(
            "/signing/signed",
            self.publish,
            methods=["POST"],
            summary="Publish what was staged and signed elsewhere",
            route_class_override=_BundleRoute,
            openapi_extra=_JSON_BODY,
        )
        add("/signing/rotations", self.rotate, methods=["POST"], status_code=201, summary="Replace a signing key")
        add(
            "/models/{name}/revocations",
            self.revoke,
            methods=["POST"],
            status_code=201,
            summary="Take versions of a model back: agents install them no more",
        )

    async def status(self) -> views.SigningView:
        return _status_view(await self._catalogue.status())

    async def root(self) -> Response:
        return Response(self._catalogue.export_root(), media_type="application/json")

    async def staged(self) -> Response:
        return Response(self._catalogue.bundle().to_bytes(), media_type="application/json")

    async def publish(self, request: Request) -> views.SigningView:
        content = await read_body(request, max_bytes=MAX_BUNDLE_BYTES)
        await self._catalogue.publish_signed(Bundle.from_bytes(content))
        return _status_view(await self._catalogue.status())

    async def rotate(self, body: views.RotationBody, request: Request) -> views.RotationView:
        await audited.describe(request, target=body.role, detail=f"replaces {body.replaces or 'the first'}")
        rotation = await self._catalogue.rotate(
            KeyRole(body.role),
            replaces=body.replaces,
            public_key=None if body.public_key is None else PublicKey.from_hex(body.public_key),
        )
        audited.add(request, detail=f"removed {rotation.removed[:16]}, added {rotation.added[:16]}")
        return views.RotationView(
            role=rotation.role, removed=rotation.removed, added=rotation.added, is_published=rotation.is_published
        )

    async def revoke(self, name: str, body: views.RevocationBody, request: Request) -> views.RevocationView:
        model = ModelName(checked_name(name, kind="model"))
        which = f"versions {sorted(body.versions)}" if body.below is None else f"below {body.below}"
        await audited.describe(request, detail=which)
        is_published = await self._catalogue.revoke(model, versions=body.versions, below=body.below)
        return views.RevocationView(model=model, is_published=is_published)


def _status_view(status: SigningStatus) -> views.SigningView:
    return views.SigningView(
        roles=tuple(map(_role_view, status.roles)),
        staged=tuple(map(_staged_view, status.staged)),
        key_places=status.key_places,
    )


def _role_view(role: RoleStatus) -> views.RoleView:
    return views.RoleView(
        role=role.role,
        version=role.version,
        expires_at=role.expires_at,
        threshold=role.threshold,
        keys=tuple(views.KeyView(id=key_id, is_here=key_id in role.present) for key_id in role.key_ids),
    )


def _staged_view(staged: StagedStatus) -> views.StagedRoleView:
    return views.StagedRoleView(
        role=staged.role,
        version=staged.version,
        created_at=staged.created_at,
        signatures=staged.signatures,
        threshold=staged.threshold,
        missing_keys=staged.missing_key_ids,
    )
