"""What every store of the catalogue promises; run on each of them."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controller.signing.model import RoleFile, StagedFile
from controller.signing.store import KEPT_VERSIONS, CatalogueStore
from controller.storage.catalogue import SqlCatalogueStore
from core.errors import Conflict, NotFound
from tests.support.catalogues import MemoryCatalogueStore
from tests.support.databases import SQL_KINDS, migrated_database

NOON = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
STAGED = StagedFile("family-meter", b"draft", NOON)


@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[CatalogueStore]:
    if request.param == "memory":
        yield MemoryCatalogueStore()
        return
    async with migrated_database(request, tmp_path) as database:
        yield SqlCatalogueStore(database)


def made(role: str, version: int) -> RoleFile:
    return RoleFile(role, version, f"{role} {version}".encode())


async def publish(store: CatalogueStore, role: str, *versions: int) -> None:
    for version in versions:
        await store.publish([made(role, version)], staged=[])


async def test_an_empty_store_has_nothing(store: CatalogueStore) -> None:
    assert list(await store.newest()) == []
    assert list(await store.staged()) == []


async def test_the_newest_of_every_role_comes_back_by_role(store: CatalogueStore) -> None:
    await publish(store, "targets", 1, 2)
    await publish(store, "root", 1)

    assert list(await store.newest()) == [made("root", 1), made("targets", 2)]


async def test_an_older_version_comes_back(store: CatalogueStore) -> None:
    await publish(store, "targets", 1, 2)

    assert await store.file("targets", 1) == made("targets", 1)


@pytest.mark.parametrize(("role", "version"), [("targets", 2), ("family-none", 1)])
async def test_a_file_that_never_was_is_not_found(store: CatalogueStore, role: str, version: int) -> None:
    await publish(store, "targets", 1)

    with pytest.raises(NotFound):
        await store.file(role, version)


@pytest.mark.parametrize("version", [1, 3])
async def test_a_version_that_is_not_the_next_is_a_conflict(store: CatalogueStore, version: int) -> None:
    await publish(store, "targets", 1)

    with pytest.raises(Conflict):
        await publish(store, "targets", version)


async def test_one_bad_file_keeps_all_out_and_the_staged_as_they_were(store: CatalogueStore) -> None:
    await store.publish([made("targets", 1)], staged=[STAGED])

    with pytest.raises(Conflict):
        await store.publish([made("snapshot", 1), made("targets", 1)], staged=[])

    assert list(await store.newest()) == [made("targets", 1)]
    assert list(await store.staged()) == [STAGED]


async def test_what_is_staged_is_replaced_as_a_whole(store: CatalogueStore) -> None:
    other = StagedFile("targets", b"other", NOON)
    await store.publish([], staged=[STAGED])

    await store.publish([], staged=[other])

    assert list(await store.staged()) == [other]


async def test_only_the_newest_timestamp_is_kept(store: CatalogueStore) -> None:
    await publish(store, "timestamp", 1, 2)

    with pytest.raises(NotFound):
        await store.file("timestamp", 1)


async def test_old_versions_go_but_roots_stay_for_ever(store: CatalogueStore) -> None:
    for role in ("root", "targets"):
        await publish(store, role, *range(1, KEPT_VERSIONS + 2))

    assert await store.file("root", 1) == made("root", 1)
    assert await store.file("targets", 2) == made("targets", 2)
    with pytest.raises(NotFound):
        await store.file("targets", 1)
