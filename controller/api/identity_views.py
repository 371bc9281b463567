"""The bodies of what is about tokens, bans, authorities and certificates, as client and server both know them.

Kept as light as `operator_views`, because the command line imports it.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.ids import Name

AuthorityStateText = Literal["next", "active", "retired"]
CertifiedRoleText = Literal["application", "broker", "device", "heavy"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class TokenBody(_Body):
    site: Name
    agent: Name | None = None
    """The one name that it is good for; such a token also replaces or unbans that agent."""
    lifetime_s: Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)] = 3600.0
    uses: Annotated[int, Field(ge=1, le=1000)] = 1


class TokenView(_View):
    id: str
    site: str
    agent: str | None
    uses_left: int
    created_by: str
    created_at: datetime
    expires_at: datetime


class TokensView(_View):
    tokens: tuple[TokenView, ...]


class IssuedTokenView(_View):
    token: TokenView
    text: str
    """What `nanofleet-agent enrol` is given; shown this once."""


class BanBody(_Body):
    reason: Annotated[str, Field(min_length=1, max_length=200)]


class BanView(_View):
    banned_at: datetime
    reason: str


class IdentityView(_View):
    agent: str
    site: str
    key_sha256: str
    not_after: datetime
    """When the present certificate expires."""
    enrolled_at: datetime
    renewed_at: datetime
    ban: BanView | None


class AuthorityView(_View):
    sha256: str
    state: AuthorityStateText
    created_at: datetime
    retired_at: datetime | None
    """When it stopped signing; it is dropped when all that it signed is over."""


class AuthoritiesView(_View):
    authorities: tuple[AuthorityView, ...]
    """Those that are trusted, the oldest first."""
    trust_bundle: str
    """Their certificates in PEM."""


class CertificateBody(_Body):
    csr: Annotated[str, Field(max_length=8192)]
    """PKCS #10 in PEM for a P-256 key; names in it are not looked at."""
    role: CertifiedRoleText = "application"
    name: Name
    site: Name | None = None
    """Where a device is; for no other role."""
    hosts: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=253)], ...], Field(max_length=16)] = ()
    """DNS names and addresses by which a broker is dialled; for no other role."""


class CertificateView(_View):
    certificate_chain: str
    trust_bundle: str
    """Every authority to trust, in PEM."""
    not_after: datetime
