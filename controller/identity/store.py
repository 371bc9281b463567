"""The port from identity to a database; `controller.storage.identity` implements it.

A use case is a function over `IdentityRecords`, and the store runs it as one transaction: a token is used up and the
identity it makes is kept together, or neither.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from controller.identity.model import AgentIdentity, Authority, TokenRecord
from core.ids import AgentId

T = TypeVar("T")


class IdentityReader(Protocol):
    """What a query sees: one consistent view."""

    def authorities(self) -> Sequence[Authority]:
        """Return all, the oldest first."""
        ...

    def token(self, secret_sha256: str) -> TokenRecord | None: ...

    def tokens(self) -> Sequence[TokenRecord]:
        """Return all, the oldest first."""
        ...

    def identity(self, agent: AgentId) -> AgentIdentity | None: ...

    def identity_of_key(self, key_sha256: str) -> AgentIdentity | None:
        """Return the identity that a key was certified for last."""
        ...

    def identities(self) -> Sequence[AgentIdentity]:
        """Return all, by agent."""
        ...


class IdentityRecords(IdentityReader, Protocol):
    """What a use case sees and may change; saving inserts or replaces."""

    def save_authority(self, authority: Authority) -> None: ...

    def delete_authority(self, sha256: str) -> None: ...

    def save_token(self, token: TokenRecord) -> None: ...

    def delete_token(self, token_id: str) -> bool:
        """Delete a token; say whether it was there."""
        ...

    def delete_tokens_expired(self, before: datetime) -> None: ...

    def save_identity(self, identity: AgentIdentity) -> None: ...


class IdentityStore(Protocol):
    async def run(self, use_case: Callable[[IdentityRecords], T]) -> T:
        """Run `use_case` as one transaction: kept when it returns, undone when it raises."""
        ...

    async def read(self, query: Callable[[IdentityReader], T]) -> T: ...
