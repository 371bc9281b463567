"""What every store of the registry promises; run on each of them."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from controller.registry.model import PublicationState
from controller.registry.store import RegistryStore
from controller.storage.registry import SqlRegistryStore
from core.errors import Conflict, NotFound, UnknownModel
from core.fleet_state import Problem
from core.ids import ModelName, VariantName
from tests.support.databases import SQL_KINDS, migrated_database
from tests.support.registry_store import MemoryRegistryStore
from tests.support.registry_values import NOON, made_publication, made_version

METER = ModelName("meter")
CAT = ModelName("cat")
INT8 = VariantName("int8-static")
FP16 = VariantName("fp16")


@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RegistryStore]:
    if request.param == "memory":
        yield MemoryRegistryStore()
        return
    async with migrated_database(request, tmp_path) as database:
        yield SqlRegistryStore(database)


async def record(store: RegistryStore, model: ModelName, version: int, *derived: VariantName) -> None:
    publication = made_publication(f"{model}-{version}", model)
    await store.add_publication(publication)
    done = replace(publication, state=PublicationState.DONE, version=version)
    await store.record_version(made_version(model, version, *derived), done)


async def test_a_recorded_version_comes_back_whole(store: RegistryStore) -> None:
    await record(store, METER, 1, FP16, INT8)

    assert await store.version(METER, 1) == made_version(METER, 1, FP16, INT8)


async def test_no_version_named_means_the_newest(store: RegistryStore) -> None:
    await record(store, METER, 1)
    await record(store, METER, 2)

    assert (await store.version(METER, None)).version == 2


async def test_versions_come_newest_first_with_their_variants(store: RegistryStore) -> None:
    await record(store, METER, 1, INT8)
    await record(store, METER, 2)
    await record(store, CAT, 1)

    assert list(await store.versions(METER)) == [made_version(METER, 2), made_version(METER, 1, INT8)]


async def test_models_come_by_name_with_their_newest_version(store: RegistryStore) -> None:
    await record(store, METER, 1)
    await record(store, METER, 2)
    await record(store, CAT, 1)

    assert [(model.name, model.latest_version) for model in await store.models()] == [(CAT, 1), (METER, 2)]


async def test_an_empty_store_has_no_models(store: RegistryStore) -> None:
    assert list(await store.models()) == []


@pytest.mark.parametrize("version", [0, 2, -1])
async def test_an_unknown_version_is_an_unknown_model(store: RegistryStore, version: int) -> None:
    await record(store, METER, 1)

    with pytest.raises(UnknownModel):
        await store.version(METER, version)


async def test_an_unknown_name_is_an_unknown_model(store: RegistryStore) -> None:
    with pytest.raises(UnknownModel):
        await store.version(METER, None)
    with pytest.raises(UnknownModel):
        await store.versions(METER)


async def test_the_next_version_counts_for_each_model(store: RegistryStore) -> None:
    await record(store, METER, 1)

    assert (await store.next_version(METER), await store.next_version(CAT)) == (2, 1)


@pytest.mark.parametrize("version", [1, 3])
async def test_a_version_that_is_not_the_next_changes_nothing(store: RegistryStore, version: int) -> None:
    await record(store, METER, 1)
    publication = made_publication("late", METER)
    await store.add_publication(publication)

    with pytest.raises(Conflict):
        await store.record_version(made_version(METER, version), replace(publication, state=PublicationState.DONE))

    assert await store.publication("late") == publication
    assert len(await store.versions(METER)) == 1


async def test_recording_for_an_unknown_publication_records_no_version(store: RegistryStore) -> None:
    with pytest.raises(NotFound):
        await store.record_version(made_version(METER, 1), made_publication("nobody", METER))

    assert list(await store.models()) == []


async def test_a_publication_comes_back_as_it_was_last_updated(store: RegistryStore) -> None:
    publication = made_publication("p", METER)
    await store.add_publication(publication)
    failed = replace(
        publication,
        state=PublicationState.FAILED,
        stage="check",
        done_ratio=0.25,
        problem=Problem("invalid_request", "not ONNX"),
        updated_at=NOON + timedelta(seconds=3),
    )
    await store.update_publication(failed)

    assert await store.publication("p") == failed


async def test_an_unknown_publication_is_not_found(store: RegistryStore) -> None:
    with pytest.raises(NotFound):
        await store.publication("p")
    with pytest.raises(NotFound):
        await store.update_publication(made_publication("p", METER))


async def test_only_running_publications_are_failed(store: RegistryStore) -> None:
    await record(store, METER, 1)
    await store.add_publication(made_publication("running", METER))
    problem = Problem("unavailable", "interrupted")

    assert await store.fail_running_publications(problem, now=NOON) == 1

    failed = await store.publication("running")
    assert (failed.state, failed.problem) == (PublicationState.FAILED, problem)
    assert (await store.publication("meter-1")).state is PublicationState.DONE
