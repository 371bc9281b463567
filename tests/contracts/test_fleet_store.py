"""What every store of the fleet promises; run on each of them."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from controller.fleet import use_cases
from controller.fleet.model import WHOLE_FLEET, Deployed, Target
from controller.fleet.restoration import Restoration
from controller.fleet.store import FleetRecords, FleetStore
from controller.registry.model import ModelVersion, PublicationState
from controller.storage.fleet import SqlFleetStore
from controller.storage.registry import SqlRegistryStore
from core.digest import digest_of
from core.errors import Conflict, UnknownModel
from core.fleet_state import Position, Problem, ReportedState, Slot, SlotPhase, SlotReport
from core.fleet_wire import MAX_SLOTS
from core.ids import AgentId, ModelName
from tests.support.databases import SQL_KINDS, migrated_database
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import (
    CAM,
    CAT,
    INT8,
    METER,
    NOON,
    NORTH,
    at_agent,
    at_site,
    made_agent,
    made_deployment,
    made_hello,
)
from tests.support.registry_values import made_publication, made_version

VERSIONS = (made_version(METER, 1, INT8), made_version(METER, 2, INT8), made_version(CAT, 1))
# As many models as a desired state may hold.
FILLING = tuple(made_version(ModelName(f"model-{number:03}"), 1) for number in range(MAX_SLOTS))
METER_1, METER_2, CAT_1 = (
    Slot(variant.model, variant.version, variant.variant, variant.manifest_digest)
    for variant in (version.variants[-1] for version in VERSIONS)
)

MANY = tuple(
    Slot(variant.model, variant.version, variant.variant, variant.manifest_digest)
    for variant in (version.variants[-1] for version in FILLING)
)


@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FleetStore]:
    """A store without agents, beside a registry that holds VERSIONS."""
    async with store_beside(VERSIONS, request, tmp_path) as made:
        yield made


@pytest.fixture(params=["memory", *SQL_KINDS])
async def roomy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FleetStore]:
    """A store beside a registry of more models than one agent may have: FILLING and VERSIONS."""
    async with store_beside((*VERSIONS, *FILLING), request, tmp_path) as made:
        yield made


@asynccontextmanager
async def store_beside(
    published: Sequence[ModelVersion], request: pytest.FixtureRequest, folder: Path
) -> AsyncIterator[FleetStore]:
    if request.param == "memory":
        yield MemoryFleetStore(published=(METER_1, METER_2, CAT_1, *MANY))
        return
    async with migrated_database(request, folder) as database:
        registry = SqlRegistryStore(database)
        for version in published:
            publication = made_publication(f"{version.model}-{version.version}", version.model)
            await registry.add_publication(publication)
            await registry.record_version(version, replace(publication, state=PublicationState.DONE))
        yield SqlFleetStore(database)


async def test_a_saved_agent_comes_back_whole(store: FleetStore) -> None:
    failed = SlotReport(METER_1, SlotPhase.FAILED, 12, 100, Problem("integrity", "fetch it again"))
    agent = replace(
        made_agent(),
        reported=ReportedState(Position(1, 2), (failed,)),
        rejection=Problem("disk_full", "need 10 more bytes, 'ünïcode'"),
        former_manifests=(METER_2.manifest_digest, CAT_1.manifest_digest),
    )

    await store.run(lambda records: records.save_agents([agent]))

    assert await store.read(lambda records: records.agent(CAM)) == agent


async def test_saving_an_agent_again_replaces_it(store: FleetStore) -> None:
    agent = made_agent()
    await store.run(lambda records: records.save_agents([agent]))
    moved = replace(agent, site=NORTH, boot_id="boot-2", desired=replace(agent.desired, position=Position(1, 4)))

    await store.run(lambda records: records.save_agents([moved]))

    assert await store.read(lambda records: list(records.agents())) == [moved]


async def test_an_unknown_agent_is_none(store: FleetStore) -> None:
    assert await store.read(lambda records: records.agent(CAM)) is None


async def test_saving_no_agents_changes_nothing(store: FleetStore) -> None:
    await store.run(lambda records: records.save_agents([]))

    assert await store.read(lambda records: list(records.agents())) == []


async def test_agents_come_by_id(store: FleetStore) -> None:
    agents = [made_agent(AgentId(name)) for name in ("c", "a", "b")]
    await store.run(lambda records: records.save_agents(agents))

    found = await store.read(lambda records: [agent.agent_id for agent in records.agents()])

    assert found == ["a", "b", "c"]


async def test_of_many_ids_the_known_ones_come_by_id(store: FleetStore) -> None:
    agents = [made_agent(AgentId(f"agent-{number:05}")) for number in range(2500)]
    await store.run(lambda records: records.save_agents(agents))
    wanted = [agent.agent_id for agent in agents[1::2]][::-1]

    found = await store.read(lambda records: [agent.agent_id for agent in records.agents([*wanted, AgentId("nobody")])])

    assert found == sorted(wanted)


async def test_a_saved_deployment_comes_back_whole(store: FleetStore) -> None:
    deployment = made_deployment(at_site(NORTH), METER_1)

    await store.run(lambda records: records.save_deployment(deployment))

    assert await store.read(lambda records: list(records.deployments())) == [deployment]


async def test_a_deployment_of_the_same_target_and_model_replaces_the_last(store: FleetStore) -> None:
    await store.run(lambda records: records.save_deployment(made_deployment(WHOLE_FLEET, METER_1)))

    await store.run(lambda records: records.save_deployment(made_deployment(WHOLE_FLEET, METER_2)))

    assert await store.read(lambda records: list(records.deployments())) == [made_deployment(WHOLE_FLEET, METER_2)]


async def test_deployments_come_by_target_and_model(store: FleetStore) -> None:
    deployments = [
        made_deployment(at_agent(CAM), METER_1),
        made_deployment(WHOLE_FLEET, CAT_1),
        made_deployment(WHOLE_FLEET, METER_1),
        made_deployment(at_site(NORTH), METER_1),
    ]

    def save(records: FleetRecords) -> None:
        for deployment in reversed(deployments):
            records.save_deployment(deployment)

    await store.run(save)

    assert await store.read(lambda records: list(records.deployments())) == deployments


async def test_a_variant_that_the_registry_does_not_hold_is_refused(store: FleetStore) -> None:
    with pytest.raises(UnknownModel, match="meter"):
        await store.run(lambda records: records.save_deployment(made_deployment(slot=replace(METER_1, version=9))))


async def test_a_use_case_that_raises_leaves_no_trace(store: FleetStore) -> None:
    def fail(records: FleetRecords) -> None:
        records.save_agents([made_agent()])
        records.save_deployment(made_deployment(slot=METER_1))
        raise Conflict("no")

    with pytest.raises(Conflict):
        await store.run(fail)

    assert await store.read(lambda records: (list(records.agents()), list(records.deployments()))) == ([], [])


async def test_a_use_case_sees_what_it_saved(store: FleetStore) -> None:
    def save_and_look(records: FleetRecords) -> object:
        records.save_agents([made_agent()])
        return records.agent(CAM)

    assert await store.run(save_and_look) == made_agent()


# ---- what an agent once had ------------------------------------------------------------------------------------


async def test_manifests_that_leave_the_desired_state_are_remembered_until_they_come_back(store: FleetStore) -> None:
    await store.run(lambda records: use_cases.greet(records, [made_hello()], now=NOON))
    formers = []
    for slot in (METER_1, METER_2, CAT_1, METER_1):
        await store.run(partial(use_cases.deploy, deployment=made_deployment(slot=slot), now=NOON))
        agent = await store.read(lambda records: records.agent(CAM))
        assert agent is not None
        formers.append(agent.former_manifests)
    assert formers == [(), (METER_1.manifest_digest,), (METER_1.manifest_digest,), (METER_2.manifest_digest,)]


async def test_a_deployment_tells_what_it_takes_the_place_of(store: FleetStore) -> None:
    await store.run(lambda records: use_cases.greet(records, [made_hello()], now=NOON))
    replaced = [
        (await store.run(partial(use_cases.deploy, deployment=made_deployment(slot=slot), now=NOON))).replaced
        for slot in (METER_1, METER_2, METER_2, CAT_1)
    ]
    assert replaced == [(), (METER_1.manifest_digest,), (), ()]


async def test_no_more_former_manifests_are_remembered_than_there_is_room_for(store: FleetStore) -> None:
    digests = tuple(digest_of(str(number).encode()) for number in range(use_cases.MAX_FORMER))
    agent = replace(made_agent(), desired=replace(made_agent().desired, slots=(METER_1,)), former_manifests=digests)
    await store.run(lambda records: records.save_agents([agent]))
    await store.run(partial(use_cases.deploy, deployment=made_deployment(slot=METER_2), now=NOON))
    after = await store.read(lambda records: records.agent(CAM))
    assert after is not None
    assert after.former_manifests == (*digests[1:], METER_1.manifest_digest)


# ---- more models than a desired state holds -------------------------------------------------------------------


def save_all(records: FleetRecords, target: Target, slots: Sequence[Slot] = MANY) -> None:
    for slot in slots:
        records.save_deployment(made_deployment(target, slot))


@pytest.mark.parametrize("target", [WHOLE_FLEET, at_site(NORTH), at_agent(CAM)])
async def test_a_target_without_agents_is_not_given_more_models_than_an_agent_may_have(
    roomy: FleetStore, target: Target
) -> None:
    await roomy.run(lambda records: save_all(records, target))

    with pytest.raises(Conflict, match="expected at most 256 models, got 257"):
        await roomy.run(lambda records: use_cases.deploy(records, made_deployment(target, METER_1), now=NOON))

    assert len(await roomy.read(lambda records: list(records.deployments()))) == MAX_SLOTS


async def test_a_model_for_the_fleet_is_refused_when_a_site_has_no_room_for_it(roomy: FleetStore) -> None:
    await roomy.run(lambda records: save_all(records, at_site(NORTH)))

    with pytest.raises(Conflict, match="site north: expected at most 256 models, got 257"):
        await roomy.run(lambda records: use_cases.deploy(records, made_deployment(WHOLE_FLEET, METER_1), now=NOON))


async def test_a_newer_version_of_a_model_needs_no_room(roomy: FleetStore) -> None:
    await roomy.run(lambda records: save_all(records, at_site(NORTH), MANY[1:]))

    for slot in (METER_1, METER_2):
        deployment = made_deployment(at_site(NORTH), slot)
        assert await roomy.run(partial(use_cases.deploy, deployment=deployment, now=NOON)) == Deployed(deployment, {})


async def test_an_agent_with_too_many_models_is_greeted_and_keeps_its_last_state(
    roomy: FleetStore, caplog: pytest.LogCaptureFixture
) -> None:
    known = made_agent(site=NORTH)
    await roomy.run(lambda records: records.save_agents([known]))
    # Each fits; together they are one too many for this agent.
    await roomy.run(lambda records: save_all(records, at_site(NORTH)))
    await roomy.run(lambda records: records.save_deployment(made_deployment(at_agent(CAM), METER_1)))

    with caplog.at_level(logging.WARNING):
        (greeted,) = await roomy.run(lambda records: use_cases.greet(records, [made_hello()], now=NOON))

    assert greeted.desired == known.desired
    assert "agent keeps its last desired state" in caplog.text
    assert await roomy.read(lambda records: records.agent(CAM)) == greeted


async def test_a_store_that_never_came_from_a_backup_says_so(store: FleetStore) -> None:
    assert await store.read(lambda records: records.restoration()) is None


async def test_the_restoration_of_the_highest_epoch_counts(store: FleetStore) -> None:
    first, second = Restoration(NOON, NOON, 2), Restoration(NOON, NOON, 3)
    confirmed = replace(second, confirmed_at=NOON)

    def save(records: FleetRecords) -> None:
        for each in (second, first, confirmed):
            records.save_restoration(each)

    await store.run(save)

    assert await store.read(lambda records: records.restoration()) == confirmed
