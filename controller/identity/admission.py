"""Who may call now: for each agent the key that was certified last, in memory, asked for every call.

A certificate that chains to our authority is not enough: the key in it must be the one certified last (or the one
before, until the last was seen), and its agent not banned. So a ban counts at once, and a name that went to another
machine locks the first one out, although its certificate is valid for days.
"""

import asyncio
import logging
from collections.abc import Iterable
from datetime import datetime

from controller.identity.model import AgentIdentity, Caller
from controller.identity.use_cases import banned
from core.errors import Forbidden, Unauthenticated, Untrusted
from core.ids import AgentId, SiteId
from core.logs import peer_text
from core.spiffe import Role

_log = logging.getLogger(__name__)

# Chosen: keys seen for the first time that wait to be recorded; those beyond are recorded when they call again.
_MAX_SEEN = 10_000


class Admission:
    def __init__(self, trust_domain: str) -> None:
        self._trust_domain = trust_domain
        self._known: dict[AgentId, AgentIdentity] = {}
        self._seen: dict[AgentId, Caller] = {}
        self._has_seen = asyncio.Event()

    def load(self, identities: Iterable[AgentIdentity]) -> None:
        self._known = {identity.agent: identity for identity in identities}

    def put(self, identity: AgentIdentity) -> None:
        self._known[identity.agent] = identity

    def site_of(self, agent: AgentId) -> SiteId | None:
        """Return the site that the agent's token was for; None when it is not known."""
        identity = self._known.get(agent)
        return None if identity is None else identity.site

    def admit(self, caller: Caller, *, now: datetime) -> None:
        """Let pass who may call.

        Raises:
            Unauthenticated: the certificate has expired, on a connection that is older.
            Untrusted: the certificate is of another trust domain.
            Forbidden: the agent is banned, or has another key now.
        """
        if caller.peer.domain != self._trust_domain:
            raise Untrusted(f"certificate: expected trust domain {self._trust_domain}, got {caller.peer.domain}")
        if now > caller.not_after:
            raise Unauthenticated(
                f"certificate: it expired at {caller.not_after:%Y-%m-%d %H:%M} UTC; renew and reconnect"
            )
        if caller.peer.role is Role.AGENT:
            self._admit_agent(AgentId(caller.peer.name), caller)

    async def wait_for_seen(self) -> None:
        await self._has_seen.wait()

    def take_seen(self) -> list[Caller]:
        """Return, once, who was seen with a key whose use is to be recorded."""
        self._has_seen.clear()
        seen, self._seen = list(self._seen.values()), {}
        return seen

    def _admit_agent(self, agent: AgentId, caller: Caller) -> None:
        identity = self._known.get(agent)
        if identity is None:
            # We certified it, so these records come from an older copy of the database. It works until its
            # certificate expires and cannot renew.
            _log.debug("agent is certified and not in the database", extra={"agent": peer_text(agent)})
            return
        if identity.ban is not None:
            raise banned(identity.ban)
        if caller.key == identity.previous_key:
            return
        is_present = caller.key == identity.key
        if not is_present and caller.issued_at <= identity.renewed_at:
            raise Forbidden(f"agent {agent}: another key was certified for this name since; enrol with a new token")
        if (not is_present or identity.previous_key is not None) and len(self._seen) < _MAX_SEEN:
            self._seen[agent] = caller
            self._has_seen.set()
