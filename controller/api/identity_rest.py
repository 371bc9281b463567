"""The part of the operator's REST that is about who belongs to the fleet: tokens, bans, authorities, certificates.

Behind `controller.api.access.Guarded`, which has proven who asks and that the role suffices.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Path, Request

from controller.api import audited
from controller.api import identity_views as views
from controller.api.access import caller_of
from controller.api.enrolment_grpc import CatalogueRoot
from controller.api.http_bodies import BoundedRoute
from controller.identity.authority import csr_from_pem
from controller.identity.model import AgentIdentity, Authority, TokenRecord
from controller.identity.service import Identity
from core.addresses import Address
from core.enrolment_token import EnrolmentToken
from core.ids import AgentId, SiteId
from core.spiffe import Role

PREFIX = "/api"

# The component is added by `http_app`, because no endpoint returns it.
_REFUSED: dict[str, Any] = {
    "description": "Refused; `detail` says why.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemView"}}},
}

AgentName = Annotated[str, Path(max_length=64)]
TokenName = Annotated[str, Path(max_length=64)]


@dataclass(frozen=True, slots=True)
class Destination:
    """What a token tells an agent: where to go, and at which root its catalogue starts."""

    controller: Address
    enrolment: Address
    root: CatalogueRoot


# The name of the operator who sent a request.
OperatorOf: TypeAlias = Callable[[Request], str]


def signed_in_operator(request: Request) -> str:
    return caller_of(request).operator.name


def router(identity: Identity, destination: Destination, *, operator_of: OperatorOf = signed_in_operator) -> APIRouter:
    """Return the endpoints about identity, below /api."""
    api = APIRouter(prefix=PREFIX, responses={"default": _REFUSED}, route_class=BoundedRoute)
    _Tokens(identity, destination, operator_of).add_to(api)
    _Agents(identity).add_to(api)
    _Authorities(identity).add_to(api)
    return api


class _Tokens:
    def __init__(self, identity: Identity, destination: Destination, operator_of: OperatorOf) -> None:
        self._identity = identity
        self._destination = destination
        self._operator_of = operator_of

    def add_to(self, api: APIRouter) -> None:
        path = "/enrolment-tokens"
        api.add_api_route(path, self.tokens, tags=["identity"], summary="List the tokens that are not expired")
        api.add_api_route(
            path,
            self.create,
            methods=["POST"],
            status_code=201,
            tags=["identity"],
            summary="Make a token that lets an agent in; it is shown once",
        )
        api.add_api_route(
            f"{path}/{{token_id}}",
            self.delete,
            methods=["DELETE"],
            status_code=204,
            tags=["identity"],
            summary="Let a token be good for nothing",
            responses={404: _REFUSED},
        )

    async def tokens(self) -> views.TokensView:
        return views.TokensView(tokens=tuple(map(_token_view, await self._identity.tokens())))

    async def create(self, body: views.TokenBody, request: Request) -> views.IssuedTokenView:
        # First, so that no token is made that cannot be told.
        root = await self._destination.root.trust_root()
        whom = f"site {body.site}, agent {body.agent or 'any'}"
        await audited.describe(request, detail=f"{whom}, uses {body.uses}, for {body.lifetime_s:.0f} s")
        made = await self._identity.create_token(
            SiteId(body.site),
            created_by=self._operator_of(request),
            agent=None if body.agent is None else AgentId(body.agent),
            lifetime=timedelta(seconds=body.lifetime_s),
            uses=body.uses,
        )
        audited.add(request, target=made.record.id)
        token = EnrolmentToken(
            made.secret,
            self._identity.authority_sha256(),
            hashlib.sha256(root).digest(),
            self._identity.trust_domain,
            self._destination.controller,
            self._destination.enrolment,
        )
        return views.IssuedTokenView(token=_token_view(made.record), text=str(token))

    async def delete(self, token_id: TokenName) -> None:
        await self._identity.delete_token(token_id)


class _Agents:
    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def add_to(self, api: APIRouter) -> None:
        api.add_api_route(
            "/agents/{agent_id}/identity",
            self.identity,
            tags=["identity"],
            summary="Show what an agent was certified for last",
            responses={404: _REFUSED},
        )
        api.add_api_route(
            "/agents/{agent_id}/ban",
            self.ban,
            methods=["POST"],
            tags=["identity"],
            summary="End an agent's session and let none of its keys count",
            responses={404: _REFUSED},
        )
        api.add_api_route(
            "/agents/{agent_id}/ban",
            self.unban,
            methods=["DELETE"],
            tags=["identity"],
            summary="Let the agent's last key count again",
            responses={404: _REFUSED},
        )

    async def identity(self, agent_id: AgentName) -> views.IdentityView:
        return _identity_view(await self._identity.identity(AgentId(agent_id)))

    async def ban(self, agent_id: AgentName, body: views.BanBody, request: Request) -> views.IdentityView:
        await audited.describe(request, detail=body.reason)
        return _identity_view(await self._identity.ban(AgentId(agent_id), reason=body.reason))

    async def unban(self, agent_id: AgentName) -> views.IdentityView:
        return _identity_view(await self._identity.unban(AgentId(agent_id)))


class _Authorities:
    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def add_to(self, api: APIRouter) -> None:
        api.add_api_route("/authority", self.status, tags=["identity"], summary="List the authorities that are trusted")
        api.add_api_route(
            "/authority/rotation",
            self.rotate,
            methods=["POST"],
            tags=["identity"],
            summary="Prepare the next authority, or let the prepared one sign",
            responses={409: _REFUSED},
        )
        api.add_api_route(
            "/authority/{sha256}",
            self.drop,
            methods=["DELETE"],
            tags=["identity"],
            summary="Trust an authority no more that does not sign, before all that it signed is over",
            responses={404: _REFUSED, 409: _REFUSED},
        )
        api.add_api_route(
            "/certificates",
            self.certify,
            methods=["POST"],
            status_code=201,
            tags=["identity"],
            summary="Certify the key of an application, a device, a broker or a replica of the heavy tier",
        )

    async def status(self) -> views.AuthoritiesView:
        return self._view(self._identity.authorities())

    async def rotate(self) -> views.AuthoritiesView:
        return self._view(await self._identity.rotate())

    async def drop(self, sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")]) -> views.AuthoritiesView:
        return self._view(await self._identity.drop_authority(sha256))

    async def certify(self, body: views.CertificateBody, request: Request) -> views.CertificateView:
        await audited.describe(request, target=f"{body.role} {body.name}")
        site = None if body.site is None else SiteId(body.site)
        certificate = self._identity.certify(
            Role(body.role), body.name, csr_from_pem(body.csr), site=site, hosts=body.hosts
        )
        return views.CertificateView(
            certificate_chain=certificate.pem.decode(),
            trust_bundle=self._identity.trust_bundle().decode(),
            not_after=certificate.not_after,
        )

    def _view(self, authorities: Sequence[Authority]) -> views.AuthoritiesView:
        return views.AuthoritiesView(
            authorities=tuple(map(_authority_view, authorities)),
            trust_bundle=self._identity.trust_bundle().decode(),
        )


def _token_view(token: TokenRecord) -> views.TokenView:
    return views.TokenView(
        id=token.id,
        site=token.site,
        agent=token.agent,
        uses_left=token.uses_left,
        created_by=token.created_by,
        created_at=token.created_at,
        expires_at=token.expires_at,
    )


def _identity_view(identity: AgentIdentity) -> views.IdentityView:
    ban = identity.ban
    return views.IdentityView(
        agent=identity.agent,
        site=identity.site,
        key_sha256=identity.key.sha256,
        not_after=identity.not_after,
        enrolled_at=identity.enrolled_at,
        renewed_at=identity.renewed_at,
        ban=None if ban is None else views.BanView(banned_at=ban.banned_at, reason=ban.reason),
    )


def _authority_view(authority: Authority) -> views.AuthorityView:
    return views.AuthorityView(
        sha256=authority.sha256,
        state=authority.state.value,
        created_at=authority.created_at,
        retired_at=authority.retired_at,
    )
