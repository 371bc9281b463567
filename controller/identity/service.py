"""`Identity`: what the operator's API, the enrolment port and the composition root may do with identities."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

from controller.identity import use_cases
from controller.identity.admission import Admission
from controller.identity.authorities import Authorities, OnDecided
from controller.identity.authority import checked_csr, is_signed_by, key_pem, new_key, public_key_of
from controller.identity.common_names import agent_common_name, common_name_for
from controller.identity.keys import AuthorityKeys
from controller.identity.model import (
    LIFETIMES,
    AgentIdentity,
    Authority,
    AuthorityState,
    Caller,
    Certificate,
    Credential,
    NewToken,
    PublicKey,
    TokenRecord,
)
from controller.identity.renewal import MAX_SIGNATURE_BYTES, RenewalNonces, signed_message
from controller.identity.store import IdentityRecords, IdentityStore
from controller.identity.use_cases import Enrolment, Issued
from core.clock import Clock
from core.enrolment_token import SECRET_BYTES
from core.errors import Conflict, InvalidRequest, NotFound, Overloaded
from core.grpc_transport import TlsIdentity
from core.ids import AgentId, SiteId, checked_name
from core.spiffe import Peer, Role

T = TypeVar("T")

_log = logging.getLogger(__name__)

DEFAULT_TOKEN_LIFETIME = timedelta(hours=1)
# Chosen: long enough to prepare devices on a Friday for a Monday.
MAX_TOKEN_LIFETIME = timedelta(days=7)
# Chosen: more open invitations than anybody overlooks.
MAX_TOKENS = 10_000
MAX_TOKEN_USES = 1000
MAX_REASON_CHARS = 200
# Chosen: how soon what is due by the clock is done.
TIDY_INTERVAL_S = 60.0
# Chosen: keys seen for the first time are recorded together.
SEEN_INTERVAL_S = 1.0

# An agent must leave: its id, and what to tell it.
OnRevoked: TypeAlias = Callable[[AgentId, str], None]


class Identity:
    """Call `prepare` first and keep `run` running in a task of the owner."""

    def __init__(
        self, store: IdentityStore, keys: AuthorityKeys, *, clock: Clock, trust_domain: str, name: str = "controller"
    ) -> None:
        self._store = store
        self._clock = clock
        self._trust_domain = trust_domain
        self._name = name
        self._authorities = Authorities(store, keys, trust_domain=trust_domain, clock=clock)
        # One change of authorities at a time: what is decided on a state holds until it is written.
        self._rotating = asyncio.Lock()
        self._admission = Admission(trust_domain)
        self._nonces = RenewalNonces()
        self._on_revoked: list[OnRevoked] = []
        self._on_decided: OnDecided | None = None
        self._unfinished: set[asyncio.Task[Any]] = set()
        self._server: TlsIdentity | None = None
        self._server_renewal_at = clock.now()

    @property
    def trust_domain(self) -> str:
        return self._trust_domain

    async def prepare(self) -> None:
        """Load the authorities and who is known; on the first start make the fleet's authority.

        Raises:
            Unavailable: an authority's private key is missing or damaged.
            Conflict: the authority is that of another trust domain.
        """
        await self._authorities.load()
        self._admission.load(await self._store.read(lambda records: records.identities()))
        self._certify_server()

    async def run(self) -> None:
        """Record which keys are in use, rotate what is due, forget expired tokens; for ever."""
        while True:
            try:
                async with asyncio.timeout(TIDY_INTERVAL_S):
                    await self._admission.wait_for_seen()
                await asyncio.sleep(SEEN_INTERVAL_S)
            except TimeoutError:
                pass  # Time to look at the clock.
            await self.tidy()

    async def tidy(self) -> None:
        """Do now what `run` does from time to time."""
        await self._record_seen()
        now = self._clock.now()
        await self._store.run(lambda records: records.delete_tokens_expired(now))
        async with self._rotating:
            await self._authorities.advance()
            self._certify_server()

    def on_revoked(self, callback: OnRevoked) -> None:
        """Call `callback` whenever the key of an agent that may be connected does not count any more."""
        self._on_revoked.append(callback)

    def on_decided(self, callback: OnDecided) -> None:
        """Call `callback` with what is decided without an operator: who was let in, which authority took its turn."""
        self._on_decided = self._authorities.on_decided = callback

    # ---- tokens -----------------------------------------------------------------------------------------------

    async def create_token(
        self,
        site: SiteId,
        *,
        created_by: str,
        agent: AgentId | None = None,
        lifetime: timedelta = DEFAULT_TOKEN_LIFETIME,
        uses: int = 1,
    ) -> NewToken:
        """Make a token for `uses` agents of a site; one that names an agent may replace or unban it.

        Raises:
            InvalidRequest: a bound is passed, or a name is malformed.
            Overloaded: there are too many tokens.
        """
        _require_token_bounds(lifetime, uses, agent)
        secret, now = secrets.token_bytes(SECRET_BYTES), self._clock.now()
        record = TokenRecord(
            id=secrets.token_hex(8),
            secret_sha256=use_cases.secret_digest(secret),
            site=SiteId(checked_name(site, kind="site")),
            agent=None if agent is None else AgentId(checked_name(agent, kind="agent")),
            uses_left=uses,
            created_by=created_by,
            created_at=now,
            expires_at=now + lifetime,
        )

        def add(records: IdentityRecords) -> None:
            if len(records.tokens()) >= MAX_TOKENS:
                raise Overloaded(f"enrolment tokens: expected at most {MAX_TOKENS}; delete some, or wait for their end")
            records.save_token(record)

        await self._store.run(add)
        _log.info("enrolment token made", extra={"token": record.id, "site": record.site, "by": created_by})
        return NewToken(record, secret)

    async def tokens(self) -> Sequence[TokenRecord]:
        """Return the tokens that are not expired, used ones included, the oldest first."""
        now = self._clock.now()
        return [token for token in await self._store.read(lambda records: records.tokens()) if token.expires_at > now]

    async def delete_token(self, token_id: str) -> None:
        """Let a token be good for nothing.

        Raises:
            NotFound: there is none.
        """
        if not await self._store.run(lambda records: records.delete_token(token_id)):
            raise NotFound(f"enrolment token {token_id[:80]!r}: there is none; it may have expired")

    # ---- agents -----------------------------------------------------------------------------------------------

    async def enrol(self, secret: bytes, csr: bytes, wanted_id: str) -> Credential:
        """Turn a token and a certificate request into an identity.

        Raises:
            Forbidden: the token is not good; which way is not told.
            InvalidRequest: the request or the wanted name is malformed, or the key is not new.
        """
        if len(secret) != SECRET_BYTES:
            raise use_cases.refused_token()
        wanted = AgentId(checked_name(wanted_id, kind="agent")) if wanted_id else None
        request = Enrolment(secret, checked_csr(csr), wanted, AgentId(f"agent-{secrets.token_hex(6)}"))
        return await self._whole(self._enrol(request))

    async def _enrol(self, request: Enrolment) -> Credential:
        now = self._clock.now()
        issued = await self._store.run(
            lambda records: use_cases.enrol(records, request, sign=self._sign_agent, now=now)
        )
        _log.info("agent enrolled", extra={"agent": issued.identity.agent, "token": issued.identity.token_id})
        if self._on_decided is not None:
            self._on_decided("agent.enrol", issued.identity.agent, f"with token {issued.identity.token_id}")
        if issued.replaced:
            self._revoke(issued.identity, "this name was given to another key; enrol with a new token")
        return self._credential(issued)

    def challenge(self, agent_id: str) -> bytes:
        """Return what the agent signs within a minute to renew; told to anybody, known or not.

        Raises:
            InvalidName: the name is malformed.
        """
        return self._nonces.make(AgentId(checked_name(agent_id, kind="agent")), now_s=self._clock.monotonic_s())

    async def renew(self, agent_id: str, *, nonce: bytes, csr: bytes, signature: bytes) -> Credential:
        """Certify a new key for an agent that proves to hold its last one.

        Raises:
            Forbidden: not proven, banned, or too long past the expiry.
            InvalidRequest: something is malformed, or the key is not new.
        """
        agent, now_s = AgentId(checked_name(agent_id, kind="agent")), self._clock.monotonic_s()
        self._nonces.require_fresh(nonce, agent, now_s=now_s)
        if len(signature) > MAX_SIGNATURE_BYTES:
            raise InvalidRequest(f"signature: expected at most {MAX_SIGNATURE_BYTES} bytes, got {len(signature)}")
        key = checked_csr(csr)
        proven = await self._proven_key(agent, signature, signed_message(nonce, csr))
        # Once more: another renewal may have used it while we waited for the database.
        self._nonces.require_fresh(nonce, agent, now_s=now_s)
        self._nonces.use(nonce, now_s=now_s)
        return await self._whole(self._renew(agent, key, proven))

    async def _renew(self, agent: AgentId, key: PublicKey, proven: PublicKey) -> Credential:
        now = self._clock.now()
        issued = await self._store.run(
            lambda records: use_cases.renew(records, agent, key, proven=proven, sign=self._sign_agent, now=now)
        )
        return self._credential(issued)

    async def identities(self) -> Sequence[AgentIdentity]:
        """Return what every agent was certified for last, by agent."""
        return await self._store.read(lambda records: records.identities())

    async def identity(self, agent: AgentId) -> AgentIdentity:
        """Return what one agent was certified for last.

        Raises:
            UnknownAgent: it was never enrolled.
        """
        return await self._store.read(lambda records: use_cases.known_identity(records, agent))

    async def ban(self, agent: AgentId, *, reason: str) -> AgentIdentity:
        """Let no key of the agent count from now on, and end its session.

        Raises:
            UnknownAgent: it was never enrolled.
            InvalidRequest: the reason is empty or too long.
        """
        if not 0 < len(reason) <= MAX_REASON_CHARS or not reason.isprintable():
            raise InvalidRequest(f"reason: expected 1 to {MAX_REASON_CHARS} printable characters")
        return await self._whole(self._ban(agent, reason))

    async def _ban(self, agent: AgentId, reason: str) -> AgentIdentity:
        now = self._clock.now()
        identity = await self._store.run(lambda records: use_cases.ban(records, agent, reason=reason, now=now))
        _log.warning("agent banned", extra={"agent": agent, "reason": reason})
        assert identity.ban is not None
        self._revoke(identity, str(use_cases.banned(identity.ban)))
        return identity

    async def unban(self, agent: AgentId) -> AgentIdentity:
        """Let the agent's last key count again: the ban was a mistake.

        Raises:
            UnknownAgent: it was never enrolled.
        """
        return await self._whole(self._unban(agent))

    async def _unban(self, agent: AgentId) -> AgentIdentity:
        identity = await self._store.run(lambda records: use_cases.unban(records, agent))
        self._admission.put(identity)
        _log.warning("agent's ban lifted", extra={"agent": agent})
        return identity

    def admit(self, caller: Caller) -> None:
        """Let pass who may call on the mTLS port. Raises Unauthenticated, Forbidden or Untrusted."""
        self._admission.admit(caller, now=self._clock.now())

    def site_of(self, agent: AgentId) -> SiteId | None:
        """Return the site that the agent was enrolled for; None when it is not known here."""
        return self._admission.site_of(agent)

    # ---- parts of ours and applications -----------------------------------------------------------------------

    def issue_local(self, role: Role, name: str) -> TlsIdentity:
        """Make a key and certify it, for a part on this machine; a part that lives longer needs another in time."""
        key = new_key()
        certificate = self._sign(Peer(self._trust_domain, role, name), public_key_of(key.public_key()))
        return TlsIdentity(certificate.pem, key_pem(key), self.trust_bundle())

    def certify(
        self, role: Role, name: str, csr: bytes, *, site: SiteId | None = None, hosts: Sequence[str] = ()
    ) -> Certificate:
        """Certify the key of a request, for a peer somewhere else that does not enrol.

        A device is one of a `site`; a broker is dialled by its `hosts`, DNS names or addresses.

        Raises:
            InvalidRequest: the request or a name is malformed, or the role is not given away like this.
        """
        common_name = common_name_for(role, name, site=site, hosts=hosts)
        peer = Peer(self._trust_domain, role, checked_name(name, kind="certificate"))
        certificate = self._sign(peer, checked_csr(csr), common_name=common_name, hosts=hosts)
        _log.info("certificate issued", extra={"peer": str(peer), "serial": certificate.serial})
        return certificate

    def server_identity(self) -> TlsIdentity:
        """Return what this controller shows to its peers now; asked before each handshake, from any thread."""
        assert self._server is not None, "prepare comes first"
        return self._server

    # ---- authorities ------------------------------------------------------------------------------------------

    def trust_bundle(self) -> bytes:
        """Return every authority to trust, in PEM."""
        return self._authorities.trust_bundle

    def authority_sha256(self) -> bytes:
        """Return what enrolment tokens pin: the authority that our own certificate chains to."""
        return self._authorities.oldest.sha256

    def authorities(self) -> Sequence[Authority]:
        """Return every authority that is trusted, the oldest first."""
        return self._authorities.records

    async def rotate(self) -> Sequence[Authority]:
        """Take the next step of a rotation: prepare an authority, or let the prepared one sign.

        Raises:
            Conflict: the last rotation is not over.
        """
        await self._whole(self._rotate())
        return self.authorities()

    async def _rotate(self) -> None:
        async with self._rotating:
            states = {record.state for record in self.authorities()}
            if AuthorityState.NEXT in states:
                await self._authorities.activate()
            elif AuthorityState.RETIRED in states:
                raise Conflict("authority: the one before is still trusted; rotate again when it is dropped")
            else:
                await self._authorities.prepare()
            self._certify_server()

    async def drop_authority(self, sha256: str) -> Sequence[Authority]:
        """Trust an authority no more that does not sign, before all that it signed is over: its key was stolen.

        Agents that it certified are refused from their next connection on, until they renew with their known key, and
        believe it until then; those that never heard of its successor need a token. Connections that stand are not
        ended.

        Raises:
            NotFound: no such authority is trusted.
            Conflict: it is the one that signs.
        """
        await self._whole(self._drop_authority(sha256))
        return self.authorities()

    async def _drop_authority(self, sha256: str) -> None:
        async with self._rotating:
            await self._authorities.drop(sha256)
            self._certify_server()

    # ---- inside -----------------------------------------------------------------------------------------------

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Finish `work` even when its caller leaves: what is stored must be known to the admission too."""
        task = asyncio.create_task(work, name="identity change")
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        return await asyncio.shield(task)

    def _sign_agent(self, agent: AgentId, key: PublicKey) -> Certificate:
        common_name = agent_common_name(agent)
        return self._sign(Peer(self._trust_domain, Role.AGENT, agent), key, common_name=common_name)

    def _sign(self, peer: Peer, key: PublicKey, *, common_name: str = "", hosts: Sequence[str] = ()) -> Certificate:
        now = self._clock.now()
        return self._authorities.active.issue(peer, key, now=now, common_name=common_name, hosts=hosts)

    def _credential(self, issued: Issued) -> Credential:
        self._admission.put(issued.identity)
        return Credential(issued.identity, issued.certificate.pem, self.trust_bundle())

    def _revoke(self, identity: AgentIdentity, reason: str) -> None:
        self._admission.put(identity)
        for callback in self._on_revoked:
            callback(identity.agent, reason)

    async def _proven_key(self, agent: AgentId, signature: bytes, message: bytes) -> PublicKey:
        identity = await self._store.read(lambda records: records.identity(agent))
        keys = () if identity is None else (identity.key, identity.previous_key)
        for key in keys:
            if key is not None and is_signed_by(key, signature, message):
                return key
        raise use_cases.refused_renewal()

    async def _record_seen(self) -> None:
        if not (seen := self._admission.take_seen()):
            return
        for identity in await self._store.run(lambda records: use_cases.settle(records, seen)):
            self._admission.put(identity)

    def _certify_server(self) -> None:
        """Renew what we show at half its lifetime, and whenever the authorities have changed."""
        now, bundle = self._clock.now(), self.trust_bundle()
        is_current = self._server is not None and self._server.trust_bundle == bundle
        if is_current and now < self._server_renewal_at:
            return
        signer, key = self._authorities.oldest, new_key()
        peer = Peer(self._trust_domain, Role.CONTROLLER, self._name)
        certificate = signer.issue(peer, public_key_of(key.public_key()), now=now)
        # The authority is shown too: an agent that enrols knows only its digest.
        self._server = TlsIdentity(certificate.pem + signer.certificate_pem, key_pem(key), bundle)
        self._server_renewal_at = now + LIFETIMES[Role.CONTROLLER] / 2


def _require_token_bounds(lifetime: timedelta, uses: int, agent: AgentId | None) -> None:
    if not timedelta() < lifetime <= MAX_TOKEN_LIFETIME:
        raise InvalidRequest(f"lifetime: expected more than 0 and at most {MAX_TOKEN_LIFETIME.days} days")
    if not 1 <= uses <= MAX_TOKEN_USES or (agent is not None and uses != 1):
        raise InvalidRequest(f"uses: expected 1 to {MAX_TOKEN_USES}, and 1 for a token that names an agent, got {uses}")
