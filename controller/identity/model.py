"""The values of identity: authorities, enrolment tokens, what an agent was certified for, and who calls."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from core.ids import AgentId, SiteId
from core.spiffe import Peer, Role

# `delivery.md`: a week; an agent renews at half of it, so it may be away for half a week and notice nothing.
AGENT_LIFETIME = timedelta(days=7)
# How long past the expiry of its certificate an agent may still renew, by the key that was certified last.
RENEWAL_WINDOW = timedelta(days=90)
# Chosen: parts of ours and applications are restarted or given a new file; nothing renews for them.
LIFETIMES = {
    Role.AGENT: AGENT_LIFETIME,
    Role.HEAVY: RENEWAL_WINDOW,
    Role.APPLICATION: RENEWAL_WINDOW,
    Role.DEVICE: RENEWAL_WINDOW,
    Role.BROKER: RENEWAL_WINDOW,
    Role.CONTROLLER: timedelta(days=30),
}
# Derived: whoever was certified by an authority, or trusts it only, may come back until then.
AUTHORITY_OVERLAP = max(LIFETIMES.values()) + AGENT_LIFETIME + timedelta(days=1)


class AuthorityState(StrEnum):
    """`next` is trusted and signs nothing yet, `active` signs, `retired` is trusted until all it signed is over."""

    NEXT = "next"
    ACTIVE = "active"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority; its private key is a file, see `keys`."""

    # Of the certificate in DER, in hexadecimal digits.
    sha256: str
    # PEM.
    certificate: str
    state: AuthorityState
    created_at: datetime
    # When it stopped signing.
    retired_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What is stored of an enrolment token: never the secret."""

    id: str
    secret_sha256: str
    site: SiteId
    # The one name that it is good for; None: whichever the agent asks for, if free, or one of ours.
    agent: AgentId | None
    uses_left: int
    created_by: str
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token just made; `secret` is shown once and then forgotten."""

    record: TokenRecord
    secret: bytes


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that an agent was certified for: SubjectPublicKeyInfo in DER."""

    der: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.der).hexdigest()


@dataclass(frozen=True, slots=True)
class Ban:
    banned_at: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    """What an agent was certified for last, and whether it may come back."""

    agent: AgentId
    site: SiteId
    key: PublicKey
    # The key before it, until the new one was seen in use: the reply that brought the new certificate may be lost.
    previous_key: PublicKey | None
    serial: str
    not_after: datetime
    enrolled_at: datetime
    renewed_at: datetime
    # The token that let it in.
    token_id: str
    ban: Ban | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """One that was just issued: the leaf in PEM, and what is remembered of it."""

    pem: bytes
    serial: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Credential:
    """What an agent gets: its identity, its certificate, and whom to trust (PEM)."""

    identity: AgentIdentity
    certificate_chain: bytes
    trust_bundle: bytes


@dataclass(frozen=True, slots=True)
class Caller:
    """Who called on the mTLS port, as its certificate says."""

    peer: Peer
    key: PublicKey
    serial: str
    issued_at: datetime
    not_after: datetime
