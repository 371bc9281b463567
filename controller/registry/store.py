"""The port from the registry to a database; `controller.storage.registry` implements it.

Every method is one transaction.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from controller.registry.model import Model, ModelVersion, Publication
from core.fleet_state import Problem
from core.ids import ModelName


class RegistryStore(Protocol):
    async def models(self) -> Sequence[Model]:
        """Return every model, by name."""
        ...

    async def versions(self, model: ModelName) -> Sequence[ModelVersion]:
        """Return every version of `model`, newest first.

        Raises:
            UnknownModel: there is none of that name.
        """
        ...

    async def version(self, model: ModelName, version: int | None) -> ModelVersion:
        """Return one version of `model`; None stands for the newest.

        Raises:
            UnknownModel: no such model or version.
        """
        ...

    async def next_version(self, model: ModelName) -> int:
        """Return the number that the next version of `model` will have; 1 for an unknown model."""
        ...

    async def record_version(self, version: ModelVersion, publication: Publication) -> None:
        """Add `version` with all its variants, and end its publication, together or not at all.

        The manifests carry the number, so it is chosen before; the transaction proves that it is still the next.

        Raises:
            Conflict: another version took the number meanwhile.
        """
        ...

    async def add_publication(self, publication: Publication) -> None: ...

    async def update_publication(self, publication: Publication) -> None:
        """Replace what is stored under `publication.id`.

        Raises:
            NotFound: there is no such publication.
        """
        ...

    async def publication(self, publication_id: str) -> Publication:
        """Return one publication.

        Raises:
            NotFound: there is no such publication.
        """
        ...

    async def fail_running_publications(self, problem: Problem, *, now: datetime) -> int:
        """Mark every RUNNING publication FAILED with `problem`; return how many there were."""
        ...
