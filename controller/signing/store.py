"""The port from the catalogue to a database; `controller.storage.catalogue` implements it."""

from collections.abc import Sequence
from typing import Protocol

from controller.signing.model import RoleFile, StagedFile

# Clients that are in the middle of a refresh finish on the snapshot they began with; older versions of all roles but
# root go. Chosen: hours of busy publishing.
KEPT_VERSIONS = 32


class CatalogueStore(Protocol):
    async def newest(self) -> Sequence[RoleFile]:
        """Return the newest version of every role, by role."""
        ...

    async def file(self, role: str, version: int) -> RoleFile:
        """Return one version of one role.

        Raises:
            NotFound: there is none, or no more.
        """
        ...

    async def staged(self) -> Sequence[StagedFile]:
        """Return what waits for signatures, by role."""
        ...

    async def publish(self, files: Sequence[RoleFile], *, staged: Sequence[StagedFile]) -> None:
        """Add files and replace everything that is staged, together or not at all.

        Of `timestamp` only the newest stays, of the others KEPT_VERSIONS, of root all.

        Raises:
            Conflict: a version exists already or is not the next of its role.
        """
        ...
