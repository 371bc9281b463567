"""The director: says to each agent, signed and for a bounded time, what it shall run (delivery.md, "Trust").

Its key is online, so it may choose only among what the catalogue lists; and it is itself listed in the catalogue, in
`targets`, so that it can be replaced: a new key signs from the moment that the metadata listing it is published, and
that metadata rides along with the first assignment it signs.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

from controller.signing.gathering import GatheringSigner
from controller.signing.keys import Signer
from core.clock import Clock
from core.fleet_state import (
    ASSIGNMENT_CONTEXT,
    AgentHello,
    CatalogueVersions,
    DesiredState,
    MetadataFile,
    SignedAssignment,
)
from core.fleet_wire import encode_desired
from core.ids import ModelName

# Chosen: an agent may be away for weeks and still install what was decided when it was last here.
ASSIGNMENT_LIFETIME = timedelta(days=30)
# Chosen: agents that stay connected always hold an assignment that is good for weeks; 5 kB each time are 0.25 B/s.
REISSUE_INTERVAL_S = 6 * 3600.0


class DirectorCatalogue(Protocol):
    """What the director asks of the catalogue."""

    async def director_signer(self) -> Signer: ...

    def lists_director(self, key_id: str) -> bool: ...

    async def newer_than(self, held: CatalogueVersions, models: Iterable[ModelName]) -> tuple[MetadataFile, ...]: ...

    async def withdrawn(self, *, after: int, timeout_s: float) -> int:
        """Wait until more than `after` withdrawals were published, or for `timeout_s`; return how many there were."""
        ...


class Director:
    def __init__(
        self, catalogue: DirectorCatalogue, *, clock: Clock, lifetime: timedelta = ASSIGNMENT_LIFETIME
    ) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._lifetime = lifetime
        self._signer: Signer | None = None
        # One looks for the key, the others wait for what it finds.
        self._looking = asyncio.Lock()
        self._gathering = GatheringSigner()
        # What agents were told of, or are to be: kept over failures of `run`, which is started again.
        self._withdrawals = 0
        self._is_reissue_due = False

    async def signed(self, desired: DesiredState, hello: AgentHello) -> SignedAssignment:
        """Sign a desired state, with the metadata that the agent of `hello` lacks to verify it.

        Raises:
            Untrusted: no listed director key is on this machine.
        """
        while True:
            signer = await self._listed_signer()
            files = await self._catalogue.newer_than(hello.catalogue, [slot.model for slot in desired.slots])
            key_id = signer.public_key.director_id
            # Listed before and after, so it is listed in these files.
            if self._catalogue.lists_director(key_id):
                break
        payload = self._payload(desired)
        signature = await self._gathering.sign(signer, ASSIGNMENT_CONTEXT + payload)
        return SignedAssignment(payload, signature, key_id, files)

    async def run(self, reissue: Callable[[], Awaitable[None]]) -> None:
        """Have live sessions given fresh assignments when something was withdrawn, and long before they expire.

        A reissue that fails ends it, and is due at once when it is started again.
        """
        while True:
            if not self._is_reissue_due:
                self._withdrawals = await self._catalogue.withdrawn(
                    after=self._withdrawals, timeout_s=REISSUE_INTERVAL_S
                )
                self._is_reissue_due = True
            await reissue()
            self._is_reissue_due = False

    def _payload(self, desired: DesiredState) -> bytes:
        # A new instant of issue too: a reissue of the same position is a new statement.
        now = self._clock.now()
        dated = replace(desired, issued_at=now, expires_at=now + self._lifetime)
        return encode_desired(dated).SerializeToString(deterministic=True)

    async def _listed_signer(self) -> Signer:
        async with self._looking:
            if self._signer is None or not self._catalogue.lists_director(self._signer.public_key.director_id):
                self._signer = await self._catalogue.director_signer()
            return self._signer
