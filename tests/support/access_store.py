"""The store of access in memory: a full one, for tests of what stands on top of it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from controller.access.model import BrowserSession, Operator, OperatorRole
from core.errors import Conflict, NotFound, Unauthenticated


class MemoryAccessStore:
    def __init__(self) -> None:
        self._operators: dict[str, Operator] = {}
        self._sessions: dict[str, BrowserSession] = {}
        # How often somebody was looked up.
        self.lookups = 0

    async def operators(self) -> Sequence[Operator]:
        self.lookups += 1
        return [operator for _, operator in sorted(self._operators.items())]

    async def add_operator(self, operator: Operator) -> None:
        if operator.name in self._operators:
            raise Conflict(f"operator {operator.name!r}: exists already")
        self._operators[operator.name] = operator

    async def replace_secret(self, name: str, secret_sha256: str) -> Operator:
        self._operators[name] = replace(self._named(name), secret_sha256=secret_sha256)
        self._end_sessions(name)
        return self._operators[name]

    async def remove_operator(self, name: str) -> None:
        admins = [operator for operator in self._operators.values() if operator.role is OperatorRole.ADMIN]
        if admins == [self._named(name)]:
            raise Conflict(f"operator {name!r}: this is the last admin")
        del self._operators[name]
        self._end_sessions(name)

    async def add_session(self, session: BrowserSession, *, secret_sha256: str, keep: int) -> None:
        operator = self._operators.get(session.operator)
        if operator is None or operator.secret_sha256 != secret_sha256:
            raise Unauthenticated(f"operator {session.operator!r}: removed or given another secret meanwhile")
        self._sessions[session.token_sha256] = session
        mine = [known for known in self._sessions.values() if known.operator == session.operator]
        for old in sorted(mine, key=lambda known: known.created_at, reverse=True)[keep:]:
            del self._sessions[old.token_sha256]

    async def session(self, token_sha256: str) -> tuple[BrowserSession, Operator] | None:
        self.lookups += 1
        session = self._sessions.get(token_sha256)
        return None if session is None else (session, self._operators[session.operator])

    async def extend_session(self, token_sha256: str, *, expires_at: datetime) -> None:
        if token_sha256 in self._sessions:
            self._sessions[token_sha256] = replace(self._sessions[token_sha256], expires_at=expires_at)

    async def remove_session(self, token_sha256: str) -> None:
        self._sessions.pop(token_sha256, None)

    async def remove_expired_sessions(self, *, now: datetime) -> int:
        expired = [token for token, session in self._sessions.items() if session.expires_at < now]
        for token in expired:
            del self._sessions[token]
        return len(expired)

    def _named(self, name: str) -> Operator:
        if name not in self._operators:
            raise NotFound(f"operator {name!r}: not known here")
        return self._operators[name]

    def _end_sessions(self, name: str) -> None:
        self._sessions = {token: session for token, session in self._sessions.items() if session.operator != name}
