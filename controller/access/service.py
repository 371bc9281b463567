"""What one may do about access: make, change and remove operators; prove who sends a request; sign browsers in and out.

Secrets and session tokens are stored as SHA-256 and shown once. They are looked up by that hash, so the time it takes
says nothing about them. What was looked up is remembered for a short while, and forgotten as soon as anything changes.
"""

import asyncio
import base64
import hashlib
import logging
import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Protocol

from controller.access.attempts import FailedAttempts
from controller.access.model import BrowserSession, Caller, Operator, OperatorRole
from controller.access.store import AccessStore
from core.clock import Clock
from core.errors import NanofleetError, Unauthenticated
from core.ids import checked_name

_log = logging.getLogger(__name__)

SECRET_PREFIX = "nfo1."  # noqa: S105 (what every secret starts with)
SESSION_LIFETIME = timedelta(hours=12)
IDLE_LIFETIME = timedelta(hours=1)
# Chosen: a session in use writes to the database this seldom.
_EXTEND_AFTER = timedelta(minutes=5)
# Chosen: more browsers than one person has.
MAX_SESSIONS_PER_OPERATOR = 16
SWEEP_S = 600.0
# Chosen: bounds how long a change made by another process stays unseen.
REMEMBER_S = 15.0
# Chosen: as many browsers as poll at one time; more are looked up in the database each time.
_MAX_REMEMBERED = 1024

_RANDOM_BYTES = 32
# 32 bytes in base64url without padding.
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_REMEDY = "ask an admin for a credential (`nanofleet operators add`)"


@dataclass(frozen=True, slots=True)
class IssuedSecret:
    """The only time that the secret is seen."""

    operator: Operator
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SignedIn:
    """The only time that the session's token is seen, except by the browser."""

    operator: Operator
    session: BrowserSession
    token: str = field(repr=False)


class Witness(Protocol):
    """Who is told of sign-ins and failed ones; waits for nothing."""

    def signed_in(self, operator: Operator, *, source: str) -> None: ...

    def signed_out(self, operator: str) -> None: ...

    def refused(self, error: NanofleetError, *, source: str) -> None:
        """A credential was shown that is nobody's."""
        ...


class Access:
    """Run `run` as long as it is used."""

    def __init__(
        self, store: AccessStore, *, clock: Clock, random_bytes: Callable[[int], bytes] = secrets.token_bytes
    ) -> None:
        self._store = store
        self._clock = clock
        self._random_bytes = random_bytes
        self._attempts = FailedAttempts(clock)
        # Every operator by the hash of its secret, and until when that is believed.
        self._operators: dict[str, Operator] = {}
        self._operators_until_s = -math.inf
        self._sessions: OrderedDict[str, tuple[Caller, float]] = OrderedDict()
        # Counts changes: what was read before one must not be remembered after it.
        self._changes = 0
        self._witnesses: list[Witness] = []

    def watched_by(self, witness: Witness) -> None:
        """Tell `witness` from now on."""
        self._witnesses.append(witness)

    # ---- operators ------------------------------------------------------------------------------------------------

    async def operators(self) -> Sequence[Operator]:
        return await self._store.operators()

    async def create(self, name: str, role: OperatorRole) -> IssuedSecret:
        """Add an operator.

        Raises:
            InvalidName: the name is not well formed.
            Conflict: there is one of that name.
        """
        secret = SECRET_PREFIX + self._token()
        operator = Operator(checked_name(name, kind="operator"), role, sha256_of(secret), self._clock.now())
        try:
            await self._store.add_operator(operator)
        finally:
            self._forget()
        return IssuedSecret(operator, secret)

    async def rotate(self, name: str) -> IssuedSecret:
        """Give an operator another secret; the old one and all sessions end at once.

        Raises:
            NotFound: there is none of that name.
        """
        secret = SECRET_PREFIX + self._token()
        try:
            return IssuedSecret(await self._store.replace_secret(name, sha256_of(secret)), secret)
        finally:
            self._forget()

    async def remove(self, name: str) -> None:
        """Remove an operator; its secret and sessions end at once.

        Raises:
            NotFound: there is none of that name.
            Conflict: it is the last admin.
        """
        try:
            await self._store.remove_operator(name)
        finally:
            self._forget()

    # ---- who sends a request --------------------------------------------------------------------------------------

    async def authenticate(self, secret: str, *, source: str) -> Operator:
        """Return whose secret it is; `source` is the network address it came from.

        Raises:
            Unauthenticated: nobody's.
            Overloaded: too many that were nobody's came from `source`.
        """
        operator = (await self._known_operators()).get(sha256_of(secret))
        if operator is None:
            refused = self._refused(f"credential: not known here, or replaced; {_REMEDY}", source)
            for witness in self._witnesses:
                witness.refused(refused, source=source)
            raise refused
        return operator

    async def resume(self, token: str, *, source: str) -> Caller:
        """Return whose browser session it is, and let it live on.

        Raises:
            Unauthenticated: there is no such session, or it has ended.
            Overloaded: too many unknown ones came from `source`.
        """
        sha256 = sha256_of(token)
        caller = self._recalled(sha256)
        if caller is None:
            changes = self._changes
            found = await self._store.session(sha256) if _TOKEN.fullmatch(token) else None
            if found is None:
                raise self._refused("session: ended or not known here; sign in again", source)
            session, operator = found
            caller = self._remember(sha256, Caller(operator, await self._extended(session)), changes)
        if caller.session is None or caller.session.expires_at <= self._clock.now():
            raise Unauthenticated("session: expired; sign in again")
        return caller

    async def sign_in(self, secret: str, *, source: str) -> SignedIn:
        """Open a browser session for whoever's secret it is. Raises as `authenticate` does."""
        operator = await self.authenticate(secret, source=source)
        now, token = self._clock.now(), self._token()
        session = BrowserSession(sha256_of(token), operator.name, self._token(), now, now + IDLE_LIFETIME)
        await self._store.add_session(session, secret_sha256=sha256_of(secret), keep=MAX_SESSIONS_PER_OPERATOR)
        _log.info("operator signed in", extra={"operator": operator.name, "source": source})
        for witness in self._witnesses:
            witness.signed_in(operator, source=source)
        return SignedIn(operator, session, token)

    async def sign_out(self, session: BrowserSession) -> None:
        try:
            await self._store.remove_session(session.token_sha256)
        finally:
            self._forget()
        for witness in self._witnesses:
            witness.signed_out(session.operator)

    async def run(self) -> None:
        """Remove expired sessions, for ever."""
        while True:
            if removed := await self._store.remove_expired_sessions(now=self._clock.now()):
                _log.debug("expired browser sessions removed", extra={"sessions": removed})
            await asyncio.sleep(SWEEP_S)

    def _refused(self, reason: str, source: str) -> Unauthenticated:
        """Return the refusal; beyond the bound on failed attempts, raise Overloaded and leave the log alone."""
        self._attempts.count(source)
        _log.info("credential refused", extra={"source": source, "reason": reason})
        return Unauthenticated(reason)

    async def _extended(self, session: BrowserSession) -> BrowserSession:
        """Return the session with its end moved on, at most to SESSION_LIFETIME after it began."""
        now = self._clock.now()
        expires_at = min(now + IDLE_LIFETIME, session.created_at + SESSION_LIFETIME)
        if session.expires_at <= now or expires_at - session.expires_at < _EXTEND_AFTER:
            return session
        await self._store.extend_session(session.token_sha256, expires_at=expires_at)
        return replace(session, expires_at=expires_at)

    # ---- what is remembered ---------------------------------------------------------------------------------------

    async def _known_operators(self) -> Mapping[str, Operator]:
        """Return all of them by the hash of their secrets: an unknown secret then costs no look into the database."""
        if self._clock.monotonic_s() < self._operators_until_s:
            return self._operators
        changes = self._changes
        operators = {operator.secret_sha256: operator for operator in await self._store.operators()}
        if changes == self._changes:
            self._operators, self._operators_until_s = operators, self._clock.monotonic_s() + REMEMBER_S
        return operators

    def _recalled(self, token_sha256: str) -> Caller | None:
        caller, until_s = self._sessions.get(token_sha256, (None, 0.0))
        return caller if self._clock.monotonic_s() < until_s else None

    def _remember(self, token_sha256: str, caller: Caller, changes: int) -> Caller:
        if changes == self._changes:
            self._sessions[token_sha256] = (caller, self._clock.monotonic_s() + REMEMBER_S)
            self._sessions.move_to_end(token_sha256)
            if len(self._sessions) > _MAX_REMEMBERED:
                self._sessions.popitem(last=False)
        return caller

    def _forget(self) -> None:
        self._changes += 1
        self._operators_until_s = -math.inf
        self._sessions.clear()

    def _token(self) -> str:
        return base64.urlsafe_b64encode(self._random_bytes(_RANDOM_BYTES)).rstrip(b"=").decode()


def sha256_of(secret: str) -> str:
    # What a peer sends may be no valid text at all; it is nobody's secret then, not an error.
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
