"""The registry's store in memory: a full one, for tests of what stands on top of it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from controller.registry.model import Model, ModelVersion, Publication, PublicationState
from core.errors import Conflict, NotFound, UnknownModel
from core.fleet_state import Problem
from core.ids import ModelName


class MemoryRegistryStore:
    def __init__(self) -> None:
        self._versions: dict[ModelName, list[ModelVersion]] = {}
        self._publications: dict[str, Publication] = {}

    async def models(self) -> Sequence[Model]:
        return [
            Model(name, history[0].created_at, history[-1].version) for name, history in sorted(self._versions.items())
        ]

    async def versions(self, model: ModelName) -> Sequence[ModelVersion]:
        return self._history(model)[::-1]

    async def version(self, model: ModelName, version: int | None) -> ModelVersion:
        history = self._history(model)
        wanted = len(history) if version is None else version
        if not 1 <= wanted <= len(history):
            raise UnknownModel(f"model {model!r}: expected a version of 1 to {len(history)}, got {wanted}")
        return history[wanted - 1]

    async def next_version(self, model: ModelName) -> int:
        return len(self._versions.get(model, [])) + 1

    async def record_version(self, version: ModelVersion, publication: Publication) -> None:
        expected = await self.next_version(version.model)
        if version.version != expected:
            raise Conflict(f"model {version.model}: expected version {expected}, got {version.version}")
        await self.update_publication(publication)
        self._versions.setdefault(version.model, []).append(version)

    async def add_publication(self, publication: Publication) -> None:
        self._publications[publication.id] = publication

    async def update_publication(self, publication: Publication) -> None:
        await self.publication(publication.id)
        self._publications[publication.id] = publication

    async def publication(self, publication_id: str) -> Publication:
        if publication_id not in self._publications:
            raise NotFound(f"publication {publication_id!r}: not known here")
        return self._publications[publication_id]

    async def fail_running_publications(self, problem: Problem, *, now: datetime) -> int:
        running = [
            publication for publication in self._publications.values() if publication.state is PublicationState.RUNNING
        ]
        for publication in running:
            self._publications[publication.id] = replace(
                publication, state=PublicationState.FAILED, problem=problem, updated_at=now
            )
        return len(running)

    def _history(self, model: ModelName) -> list[ModelVersion]:
        if model not in self._versions:
            raise UnknownModel(f"model {model!r}: not in the registry; publish it first")
        return self._versions[model]
