"""The store of identity in memory: a full one, for tests of what stands on top of it."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from controller.identity.model import AgentIdentity, Authority, TokenRecord
from controller.identity.store import IdentityReader, IdentityRecords
from core.ids import AgentId

T = TypeVar("T")


class MemoryIdentityStore:
    def __init__(self) -> None:
        self._records = _MemoryIdentityRecords({}, {}, {})

    async def run(self, use_case: Callable[[IdentityRecords], T]) -> T:
        records = self._records.copy()
        result = use_case(records)
        self._records = records
        return result

    async def read(self, query: Callable[[IdentityReader], T]) -> T:
        return query(self._records.copy())


class _MemoryIdentityRecords:
    def __init__(
        self,
        authorities: dict[str, Authority],
        tokens: dict[str, TokenRecord],
        identities: dict[AgentId, AgentIdentity],
    ) -> None:
        self._authorities = authorities
        self._tokens = tokens
        self._identities = identities

    def copy(self) -> "_MemoryIdentityRecords":
        return _MemoryIdentityRecords(dict(self._authorities), dict(self._tokens), dict(self._identities))

    def authorities(self) -> Sequence[Authority]:
        return sorted(self._authorities.values(), key=lambda authority: (authority.created_at, authority.sha256))

    def token(self, secret_sha256: str) -> TokenRecord | None:
        return next((token for token in self._tokens.values() if token.secret_sha256 == secret_sha256), None)

    def tokens(self) -> Sequence[TokenRecord]:
        return sorted(self._tokens.values(), key=lambda token: (token.created_at, token.id))

    def identity(self, agent: AgentId) -> AgentIdentity | None:
        return self._identities.get(agent)

    def identity_of_key(self, key_sha256: str) -> AgentIdentity | None:
        return next((each for each in self._identities.values() if each.key.sha256 == key_sha256), None)

    def identities(self) -> Sequence[AgentIdentity]:
        return [self._identities[agent] for agent in sorted(self._identities)]

    def save_authority(self, authority: Authority) -> None:
        self._authorities[authority.sha256] = authority

    def delete_authority(self, sha256: str) -> None:
        self._authorities.pop(sha256, None)

    def save_token(self, token: TokenRecord) -> None:
        self._tokens[token.id] = token

    def delete_token(self, token_id: str) -> bool:
        return self._tokens.pop(token_id, None) is not None

    def delete_tokens_expired(self, before: datetime) -> None:
        self._tokens = {key: token for key, token in self._tokens.items() if token.expires_at >= before}

    def save_identity(self, identity: AgentIdentity) -> None:
        self._identities[identity.agent] = identity
