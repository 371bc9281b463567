"""The registry on SQL; see the port `controller.registry.store` for what each method promises."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from controller.registry.model import ORIGINAL, Measured, Model, ModelVersion, Publication, PublicationState, Variant
from controller.storage.database import Database
from controller.storage.tables import models, publications, variants, versions
from core.digest import Digest
from core.errors import Conflict, NotFound, UnknownModel
from core.fleet_state import Problem
from core.ids import ModelName, VariantName
from core.manifest import parse_manifest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class SqlRegistryStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def models(self) -> Sequence[Model]:
        return await self._database.read(_select_models)

    async def versions(self, model: ModelName) -> Sequence[ModelVersion]:
        return await self._database.read(lambda connection: _select_versions(connection, model))

    async def version(self, model: ModelName, version: int | None) -> ModelVersion:
        return await self._database.read(lambda connection: _select_version(connection, model, version))

    async def next_version(self, model: ModelName) -> int:
        return await self._database.read(lambda connection: _next_version(connection, model))

    async def record_version(self, version: ModelVersion, publication: Publication) -> None:
        await self._database.run(lambda connection: _record_version(connection, version, publication))

    async def add_publication(self, publication: Publication) -> None:
        statement = insert(publications).values(_publication_row(publication))
        await self._database.run(lambda connection: connection.execute(statement))

    async def update_publication(self, publication: Publication) -> None:
        await self._database.run(lambda connection: _update_publication(connection, publication))

    async def publication(self, publication_id: str) -> Publication:
        return await self._database.read(lambda connection: _select_publication(connection, publication_id))

    async def fail_running_publications(self, problem: Problem, *, now: datetime) -> int:
        statement = (
            update(publications)
            .where(publications.c.state == PublicationState.RUNNING.value)
            .values(
                state=PublicationState.FAILED.value,
                error_code=problem.code,
                error_message=problem.message,
                updated_us=_microseconds(now),
            )
        )
        return await self._database.run(lambda connection: connection.execute(statement).rowcount)


# ---- versions and variants ------------------------------------------------------------------------------------


def _select_models(connection: Connection) -> Sequence[Model]:
    statement = (
        select(models.c.name, models.c.created_us, func.max(versions.c.version).label("latest"))
        .join(versions, versions.c.model == models.c.name)
        .group_by(models.c.name)
        .order_by(models.c.name)
    )
    return [
        Model(ModelName(row["name"]), _instant(row["created_us"]), row["latest"])
        for row in connection.execute(statement).mappings()
    ]


def _select_versions(connection: Connection, model: ModelName) -> Sequence[ModelVersion]:
    found = _versions(connection.execute(_VERSIONS.where(variants.c.model == model)).mappings())
    if not found:
        raise UnknownModel(f"model {model!r}: not in the registry; publish it first")
    return found


def _select_version(connection: Connection, model: ModelName, version: int | None) -> ModelVersion:
    newest = _next_version(connection, model) - 1
    if newest == 0:
        raise UnknownModel(f"model {model!r}: not in the registry; publish it first")
    wanted = newest if version is None else version
    statement = _VERSIONS.where(variants.c.model == model, variants.c.version == wanted)
    found = _versions(connection.execute(statement).mappings())
    if not found:
        raise UnknownModel(f"model {model!r}: expected a version of 1 to {newest}, got {wanted}")
    return found[0]


def _next_version(connection: Connection, model: ModelName) -> int:
    newest = connection.scalar(select(func.max(versions.c.version)).where(versions.c.model == model))
    return (newest or 0) + 1


def _record_version(connection: Connection, version: ModelVersion, publication: Publication) -> None:
    expected = _next_version(connection, version.model)
    if version.version != expected:
        raise Conflict(f"model {version.model}: expected version {expected}, got {version.version}; publish it again")
    created_us = _microseconds(version.created_at)
    if expected == 1:
        connection.execute(insert(models).values(name=version.model, created_us=created_us))
    connection.execute(insert(versions).values(model=version.model, version=version.version, created_us=created_us))
    connection.execute(insert(variants), [_variant_row(variant) for variant in version.variants])
    _update_publication(connection, publication)


# Newest first; of one version the original first, then the others by name.
_VERSIONS = (
    select(variants, versions.c.created_us)
    .join_from(variants, versions, (versions.c.model == variants.c.model) & (versions.c.version == variants.c.version))
    .order_by(variants.c.version.desc(), variants.c.variant != ORIGINAL, variants.c.variant)
)


def _versions(rows: Iterable[RowMapping]) -> list[ModelVersion]:
    return [
        ModelVersion(ModelName(model), version, _instant(created_us), tuple(_variant(row) for row in group))
        for (model, version, created_us), group in groupby(rows, itemgetter("model", "version", "created_us"))
    ]


def _variant(row: RowMapping) -> Variant:
    return Variant(
        model=ModelName(row["model"]),
        version=row["version"],
        variant=VariantName(row["variant"]),
        manifest_digest=Digest(row["manifest_digest"]),
        manifest=parse_manifest(row["manifest"]),
        measured=Measured(
            size_bytes=row["size_bytes"],
            latency_p50_us=row["latency_p50_us"],
            latency_p90_us=row["latency_p90_us"],
            accuracy_ratio=row["accuracy_ratio"],
            evaluated_samples=row["evaluated_samples"],
        ),
    )


def _variant_row(variant: Variant) -> dict[str, Any]:
    measured = variant.measured
    return {
        "model": variant.model,
        "version": variant.version,
        "variant": variant.variant,
        "manifest_digest": variant.manifest_digest,
        "manifest": variant.manifest.to_bytes(),
        "size_bytes": measured.size_bytes,
        "accuracy_ratio": measured.accuracy_ratio,
        "evaluated_samples": measured.evaluated_samples,
        "latency_p50_us": measured.latency_p50_us,
        "latency_p90_us": measured.latency_p90_us,
    }


# ---- publications ---------------------------------------------------------------------------------------------


def _update_publication(connection: Connection, publication: Publication) -> None:
    statement = update(publications).where(publications.c.id == publication.id).values(_publication_row(publication))
    if connection.execute(statement).rowcount == 0:
        raise NotFound(f"publication {publication.id!r}: not known here")


def _select_publication(connection: Connection, publication_id: str) -> Publication:
    statement = select(publications).where(publications.c.id == publication_id)
    row = connection.execute(statement).mappings().one_or_none()
    if row is None:
        raise NotFound(f"publication {publication_id[:80]!r}: not known here")
    return Publication(
        id=row["id"],
        model=ModelName(row["model"]),
        state=PublicationState(row["state"]),
        stage=row["stage"],
        done_ratio=row["done_ratio"],
        created_at=_instant(row["created_us"]),
        updated_at=_instant(row["updated_us"]),
        version=row["version"],
        problem=None if row["error_code"] is None else Problem(row["error_code"], row["error_message"]),
    )


def _publication_row(publication: Publication) -> dict[str, Any]:
    problem = publication.problem
    return {
        "id": publication.id,
        "model": publication.model,
        "state": publication.state.value,
        "stage": publication.stage,
        "done_ratio": publication.done_ratio,
        "version": publication.version,
        "error_code": problem and problem.code,
        "error_message": problem and problem.message,
        "created_us": _microseconds(publication.created_at),
        "updated_us": _microseconds(publication.updated_at),
    }


def _microseconds(instant: datetime) -> int:
    return (instant - _EPOCH) // _MICROSECOND


def _instant(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND
