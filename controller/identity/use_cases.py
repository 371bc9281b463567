"""What identity does to its records: each function is one transaction, so that a token makes one identity or none.

Certificates are made inside the transaction that remembers them: nothing is certified that is not recorded.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeAlias

from controller.identity.model import RENEWAL_WINDOW, AgentIdentity, Ban, Caller, Certificate, PublicKey, TokenRecord
from controller.identity.store import IdentityReader, IdentityRecords
from core.errors import Forbidden, InvalidRequest, UnknownAgent
from core.ids import AgentId

# Certifies a key for an agent.
Sign: TypeAlias = Callable[[AgentId, PublicKey], Certificate]


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What an agent asks for, with the name that it gets when it has no right to another."""

    secret: bytes
    key: PublicKey
    wanted: AgentId | None
    generated: AgentId


@dataclass(frozen=True, slots=True)
class Issued:
    """`replaced`: another key had the name until now and does not count any more."""

    identity: AgentIdentity
    certificate: Certificate
    replaced: bool = False


def secret_digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def refused_token() -> Forbidden:
    """Return the one refusal for every token that is not good, so that guessing teaches nothing."""
    return Forbidden(
        "enrolment token: it is unknown, used, expired or of another controller; make another with "
        "`nanofleet devices token`"
    )


def enrol(records: IdentityRecords, request: Enrolment, *, sign: Sign, now: datetime) -> Issued:
    """Turn a token and a key into an identity.

    A token that is used up still answers the one key that it let in, because the reply to it may have been lost.

    Raises:
        Forbidden: the token is not good.
        InvalidRequest: the key belongs to another identity, or to a banned one.
    """
    token = records.token(secret_digest(request.secret))
    if token is None or token.expires_at <= now:
        raise refused_token()
    known = records.identity_of_key(request.key.sha256)
    if known is not None and known.token_id == token.id and known.ban is None:
        return _issue_again(records, known, sign=sign, now=now)
    if token.uses_left == 0:
        raise refused_token()
    agent = _name_for(records, request, token)
    if known is not None and (known.ban is not None or known.agent != agent):
        raise InvalidRequest("certificate request: its key was certified before; make a new one")
    holder = records.identity(agent)
    certificate = sign(agent, request.key)
    identity = _enrolled(agent, request.key, certificate, token, now)
    records.save_token(replace(token, uses_left=token.uses_left - 1))
    records.save_identity(identity)
    return Issued(identity, certificate, replaced=holder is not None and holder.key != request.key)


def renew(
    records: IdentityRecords, agent: AgentId, key: PublicKey, *, proven: PublicKey, sign: Sign, now: datetime
) -> Issued:
    """Certify a new key for an agent that has proven to hold the key `proven`.

    Raises:
        Forbidden: that key does not count, or the agent is banned or too late.
        InvalidRequest: the key is not new.
    """
    identity = records.identity(agent)
    if identity is None or proven not in {identity.key, identity.previous_key}:
        raise refused_renewal()
    require_welcome(identity, now=now)
    holder = records.identity_of_key(key.sha256)
    # The reply to an earlier renewal was lost when the older key asks for the same new key again.
    is_repeated = proven == identity.previous_key and key == identity.key
    if key == proven or (holder is not None and not is_repeated):
        raise InvalidRequest("certificate request: its key was certified before; each renewal needs a new one")
    certificate = sign(agent, key)
    renewed = replace(
        identity,
        key=key,
        previous_key=proven,
        serial=certificate.serial,
        not_after=certificate.not_after,
        renewed_at=now,
    )
    records.save_identity(renewed)
    return Issued(renewed, certificate)


def refused_renewal() -> Forbidden:
    """Return the one refusal for whoever has not proven to be the agent."""
    return Forbidden("renewal: unknown agent, or not signed by the key that was certified last; enrol with a new token")


def require_welcome(identity: AgentIdentity, *, now: datetime) -> None:
    """Let those renew who are not banned and not too late; they have proven who they are, so they are told why not."""
    if identity.ban is not None:
        raise banned(identity.ban)
    if now > identity.not_after + RENEWAL_WINDOW:
        raise Forbidden(
            f"renewal: the certificate expired on {identity.not_after:%Y-%m-%d}, more than {RENEWAL_WINDOW.days} days "
            "ago; enrol with a new token"
        )


def banned(ban: Ban) -> Forbidden:
    return Forbidden(f"banned since {ban.banned_at:%Y-%m-%d %H:%M} UTC: {ban.reason}; enrol with a token for this name")


def known_identity(records: IdentityReader, agent: AgentId) -> AgentIdentity:
    """Return an agent's identity. Raises UnknownAgent."""
    if (identity := records.identity(agent)) is None:
        raise UnknownAgent(f"agent {agent[:80]!r}: never enrolled here; see `nanofleet devices list`")
    return identity


def ban(records: IdentityRecords, agent: AgentId, *, reason: str, now: datetime) -> AgentIdentity:
    """Let no key of this agent count; a second ban changes the reason only."""
    identity = known_identity(records, agent)
    since = now if identity.ban is None else identity.ban.banned_at
    changed = replace(identity, ban=Ban(since, reason))
    records.save_identity(changed)
    return changed


def unban(records: IdentityRecords, agent: AgentId) -> AgentIdentity:
    """Let the agent's last key count again: the ban was a mistake."""
    changed = replace(known_identity(records, agent), ban=None)
    records.save_identity(changed)
    return changed


def settle(records: IdentityRecords, seen: Iterable[Caller]) -> list[AgentIdentity]:
    """Record which keys were seen in use: the key before each does not count any more. Return what changed."""
    changed = [
        settled
        for caller in seen
        if (identity := records.identity(AgentId(caller.peer.name))) is not None
        and (settled := _settled(identity, caller)) != identity
    ]
    for identity in changed:
        records.save_identity(identity)
    return changed


def _settled(identity: AgentIdentity, caller: Caller) -> AgentIdentity:
    if identity.key == caller.key:
        return replace(identity, previous_key=None)
    if caller.issued_at <= identity.renewed_at:
        return identity
    # Certified by us after what these records know: they come from an older copy of the database.
    return replace(
        identity,
        key=caller.key,
        previous_key=None,
        serial=caller.serial,
        not_after=caller.not_after,
        renewed_at=caller.issued_at,
    )


def _name_for(records: IdentityRecords, request: Enrolment, token: TokenRecord) -> AgentId:
    if token.agent is not None:
        return token.agent
    if request.wanted is None:
        return request.generated
    holder = records.identity(request.wanted)
    is_free = holder is None or (holder.ban is None and holder.key == request.key)
    return request.wanted if is_free else request.generated


def _enrolled(
    agent: AgentId, key: PublicKey, certificate: Certificate, token: TokenRecord, now: datetime
) -> AgentIdentity:
    return AgentIdentity(
        agent=agent,
        site=token.site,
        key=key,
        previous_key=None,
        serial=certificate.serial,
        not_after=certificate.not_after,
        enrolled_at=now,
        renewed_at=now,
        token_id=token.id,
    )


def _issue_again(records: IdentityRecords, known: AgentIdentity, *, sign: Sign, now: datetime) -> Issued:
    certificate = sign(known.agent, known.key)
    identity = replace(known, serial=certificate.serial, not_after=certificate.not_after, renewed_at=now)
    records.save_identity(identity)
    return Issued(identity, certificate)
