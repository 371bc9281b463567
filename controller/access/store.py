"""The port from access to a database; `controller.storage.access` implements it.

Every method is one transaction.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from controller.access.model import BrowserSession, Operator


class AccessStore(Protocol):
    # ---- operators ------------------------------------------------------------------------------------------------

    async def operators(self) -> Sequence[Operator]:
        """Return every operator, by name."""
        ...

    async def add_operator(self, operator: Operator) -> None:
        """Add `operator`.

        Raises:
            Conflict: there is one of that name.
        """
        ...

    async def replace_secret(self, name: str, secret_sha256: str) -> Operator:
        """Give the operator another secret and end its sessions; return it as it is now.

        Raises:
            NotFound: there is none of that name.
        """
        ...

    async def remove_operator(self, name: str) -> None:
        """Remove the operator and its sessions.

        Raises:
            NotFound: there is none of that name.
            Conflict: it is the last admin.
        """
        ...

    # ---- browser sessions -----------------------------------------------------------------------------------------

    async def add_session(self, session: BrowserSession, *, secret_sha256: str, keep: int) -> None:
        """Add `session`, opened by this secret; of its operator's, only the newest `keep` stay.

        The transaction proves that the secret is still the operator's: who holds one that is being replaced must not
        slip in behind the replacement.

        Raises:
            Unauthenticated: the operator is gone or has another secret.
        """
        ...

    async def session(self, token_sha256: str) -> tuple[BrowserSession, Operator] | None:
        """Return the session, expired or not, and whose it is."""
        ...

    async def extend_session(self, token_sha256: str, *, expires_at: datetime) -> None:
        """Move the end of the session; nothing happens when it is gone."""
        ...

    async def remove_session(self, token_sha256: str) -> None:
        """End the session; nothing happens when it is gone."""
        ...

    async def remove_expired_sessions(self, *, now: datetime) -> int:
        """Remove what expired before `now`; return how many."""
        ...
