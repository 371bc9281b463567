"""The fleet as operators and agents meet it, over a store in memory."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from controller.fleet.model import WHOLE_FLEET, Target
from controller.fleet.service import MAX_PLAUSIBLE, Fleet
from controller.fleet.sessions import Replaced, Session, Stopping
from controller.fleet.store import FleetRecords
from core.errors import Conflict, InvalidRequest, Overloaded, Quarantined, Unavailable, UnknownAgent, UnknownModel
from core.fleet_state import NOWHERE, AgentHello, DesiredState, Position, Problem, PushResult
from core.fleet_wire import MAX_SLOTS
from core.ids import AgentId, ModelName
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import (
    CAM,
    CAT,
    FP16,
    INT8,
    METER,
    NORTH,
    SOUTH,
    FakeCatalogue,
    HeldClock,
    at_agent,
    at_site,
    made_deployment,
    made_hello,
    made_report,
    made_slot,
)
from tests.support.releases import OpenCatalogue

FIRST = Position(1, 1)
SECOND = Position(1, 2)
OTHER = AgentId("cam-2")


class World:
    """A fleet and what it stands on."""

    def __init__(self, *, max_sessions: int = 10) -> None:
        self.store = MemoryFleetStore()
        self.catalogue = FakeCatalogue()
        self.clock = HeldClock()
        self.fleet = Fleet(
            self.store, self.catalogue, releases=OpenCatalogue(), clock=self.clock, max_sessions=max_sessions
        )

    async def deploy(self, target: Target = WHOLE_FLEET, model: ModelName = METER, version: int | None = 1) -> None:
        await self.fleet.deploy(target, model=model, version=version, variant=INT8)

    @asynccontextmanager
    async def online(self, hello: AgentHello) -> AsyncIterator[Session]:
        async with self.fleet.session(hello) as (session, _):
            yield session

    async def visit(self, hello: AgentHello) -> None:
        """Say hello and leave."""
        async with self.online(hello):
            pass

    async def position(self, agent_id: AgentId = CAM) -> Position:
        return (await self.fleet.agent(agent_id)).agent.desired.position


@pytest.fixture
def world() -> World:
    return World()


def is_idle(session: Session) -> bool:
    """Say whether the outbox is empty and the session not over."""
    taking = session.take()
    try:
        taking.send(None)
    except StopIteration:
        return False
    else:
        return True
    finally:
        taking.close()


async def taken(session: Session) -> DesiredState:
    """Return what is in the outbox."""
    async with asyncio.timeout(1):
        desired = await session.take()
    assert isinstance(desired, DesiredState)
    return desired


# ---- what an agent shall run ----------------------------------------------------------------------------------


async def test_a_new_agent_without_deployments_is_in_sync_at_once(world: World) -> None:
    async with world.fleet.session(made_hello()) as (session, position):
        assert position == NOWHERE
        assert is_idle(session)


async def test_a_new_agent_gets_what_its_site_runs(world: World) -> None:
    await world.deploy(at_site(NORTH))

    async with world.online(made_hello()) as session:
        desired = await taken(session)

    assert (desired.position, desired.slots) == (FIRST, (made_slot(METER, 1),))


async def test_a_deployment_reaches_online_agents_at_once(world: World) -> None:
    async with world.online(made_hello()) as session:
        await world.deploy()

        assert (await taken(session)).slots == (made_slot(METER, 1),)


async def test_no_version_means_the_newest_one_when_it_was_asked_for(world: World) -> None:
    await world.visit(made_hello())
    await world.deploy(version=None)
    world.catalogue.newest = 3

    await world.visit(made_hello())

    assert (await world.fleet.agent(CAM)).agent.desired.slots == (made_slot(METER, 2),)


async def test_a_deployment_says_which_agents_it_moves_and_where_to(world: World) -> None:
    await world.visit(made_hello())
    await world.visit(made_hello(OTHER, site=SOUTH))
    await world.deploy(at_site(NORTH))

    deployed = await world.fleet.deploy(WHOLE_FLEET, model=CAT, version=1, variant=FP16)

    assert {agent_id: desired.position for agent_id, desired in deployed.agents.items()} == {CAM: SECOND, OTHER: FIRST}
    assert deployed.deployment.slot == made_slot(CAT, 1, FP16)


async def test_an_agent_with_a_more_specific_deployment_is_not_affected(world: World) -> None:
    await world.visit(made_hello())
    await world.deploy(at_agent(CAM), version=2)

    deployed = await world.fleet.deploy(WHOLE_FLEET, model=METER, version=1, variant=INT8)

    assert deployed.agents == {}
    assert await world.position() == FIRST


async def test_the_same_deployment_again_moves_nobody(world: World) -> None:
    await world.visit(made_hello())
    await world.deploy()
    await world.deploy()

    assert await world.position() == FIRST


async def test_every_change_of_the_slots_is_one_generation(world: World) -> None:
    await world.visit(made_hello())
    for version in (1, 2, 1):
        await world.deploy(version=version)

    assert await world.position() == Position(1, 3)


async def test_an_agent_that_moves_to_another_site_gets_its_deployments(world: World) -> None:
    await world.deploy(at_site(NORTH))
    await world.deploy(at_site(SOUTH), version=2)
    await world.visit(made_hello(site=NORTH))

    async with world.online(made_hello(site=SOUTH, applied=FIRST)) as session:
        desired = await taken(session)

    assert (desired.position, desired.slots) == (SECOND, (made_slot(METER, 2),))


async def test_an_unknown_model_is_not_deployed(world: World) -> None:
    with pytest.raises(UnknownModel):
        await world.deploy(model=ModelName("ghost"))

    assert list(await world.fleet.deployments()) == []


async def test_more_models_than_a_desired_state_may_hold_are_refused() -> None:
    world = World()

    def fill(records: FleetRecords) -> None:
        for number in range(MAX_SLOTS):
            records.save_deployment(made_deployment(WHOLE_FLEET, made_slot(ModelName(f"model-{number}"))))

    await world.store.run(fill)
    await world.visit(made_hello())

    with pytest.raises(Conflict, match="at most 256 models, got 257"):
        await world.deploy()

    assert len(await world.fleet.deployments()) == MAX_SLOTS


# ---- pushes and their answers ---------------------------------------------------------------------------------


async def test_an_agent_in_sync_gets_no_push(world: World) -> None:
    await world.deploy()
    await world.visit(made_hello())

    async with world.fleet.session(made_hello(applied=FIRST)) as (session, position):
        assert position == FIRST
        assert is_idle(session)


async def test_a_lost_push_comes_with_the_next_session(world: World) -> None:
    async with world.online(made_hello()):
        await world.deploy()

    async with world.online(made_hello()) as session:
        assert (await taken(session)).position == FIRST


async def test_the_outbox_holds_the_newest_state_only(world: World) -> None:
    async with world.online(made_hello()) as session:
        for version in (1, 2, 1):
            await world.deploy(version=version)

        assert (await taken(session)).position == Position(1, 3)
        assert is_idle(session)


async def test_a_refused_push_is_kept_with_its_reason_and_shown_at_once(world: World) -> None:
    problem = Problem("disk_full", "need 10 bytes more")
    async with world.online(made_hello()) as session:
        await world.deploy()
        world.fleet.push_result(session, PushResult(FIRST, problem))
        shown = await world.fleet.agent(CAM)
    await world.fleet.flush()

    stored = await world.store.read(lambda records: records.agent(CAM))
    assert shown.agent.rejection == problem
    assert stored is not None
    assert (stored.rejection, stored.reported.applied) == (problem, NOWHERE)


async def test_a_word_about_an_overtaken_push_changes_nothing(world: World) -> None:
    async with world.online(made_hello()) as session:
        await world.deploy()
        await world.deploy(version=2)
        world.fleet.push_result(session, PushResult(FIRST, Problem("internal", "no")))

        assert (await world.fleet.agent(CAM)).agent.rejection is None


async def test_the_next_desired_state_forgets_the_refusal_of_the_last(world: World) -> None:
    async with world.online(made_hello()) as session:
        await world.deploy()
        world.fleet.push_result(session, PushResult(FIRST, Problem("internal", "no")))
        await world.fleet.flush()
        await world.deploy(version=2)

        assert (await world.fleet.agent(CAM)).agent.rejection is None


async def test_an_applied_push_makes_the_agent_in_sync(world: World) -> None:
    async with world.online(made_hello()) as session:
        await world.deploy()
        world.fleet.push_result(session, PushResult(FIRST))

        assert (await world.fleet.agent(CAM)).agent.is_in_sync


async def test_an_agent_cannot_claim_more_than_it_was_given(world: World) -> None:
    async with world.online(made_hello()) as session:
        await world.deploy()
        world.fleet.reported(session, made_report(Position(1, 1 << 40)))
        world.fleet.push_result(session, PushResult(Position(9, 9)))
        await world.fleet.flush()
        await world.deploy(version=2)

    assert await world.position() == SECOND


async def test_pushes_follow_even_when_the_operator_left_in_the_middle(world: World) -> None:
    async with world.online(made_hello()) as session:
        world.store.committed.clear()
        world.store.stalled = True
        deploying = asyncio.create_task(world.deploy())
        await world.store.committed.wait()
        deploying.cancel()
        await asyncio.wait([deploying])
        world.store.stalled = False

        await world.fleet.flush()

        assert (await taken(session)).position == FIRST


# ---- an agent that is ahead -----------------------------------------------------------------------------------


async def test_an_agent_ahead_of_a_restored_database_keeps_what_it_runs(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.deploy()

    with caplog.at_level(logging.WARNING):
        async with world.online(made_hello(applied=Position(1, 7))) as session:
            assert is_idle(session)

    assert "ahead of this database" in caplog.text
    assert (await world.fleet.agent(CAM)).agent.is_ahead


async def test_the_next_deployment_goes_beyond_an_agent_that_is_ahead(world: World) -> None:
    await world.deploy()
    async with world.online(made_hello(applied=Position(1, 7))) as session:
        await world.deploy()

        desired = await taken(session)
    assert (desired.position, desired.slots) == (Position(1, 8), (made_slot(METER, 1),))


async def test_an_agent_of_a_later_epoch_is_met_in_its_epoch(world: World) -> None:
    async with world.online(made_hello(applied=Position(4, 2))) as session:
        await world.deploy()

        assert (await taken(session)).position == Position(4, 3)


async def test_a_position_that_nobody_can_have_reached_is_refused(world: World) -> None:
    with pytest.raises(InvalidRequest, match="applied position"):
        await world.visit(made_hello(applied=Position(1, MAX_PLAUSIBLE + 1)))


# ---- presence and reports -------------------------------------------------------------------------------------


async def test_an_agent_is_online_as_long_as_its_session_is_open(world: World) -> None:
    async with world.online(made_hello()):
        world.clock.advance(5)
        during = await world.fleet.agent(CAM)
        at_the_end = world.clock.now()
    world.clock.advance(60)
    after = await world.fleet.agent(CAM)

    assert (during.is_online, during.agent.last_seen_at) == (True, at_the_end)
    assert (after.is_online, after.agent.last_seen_at) == (False, at_the_end)


async def test_agents_are_listed_with_their_presence(world: World) -> None:
    await world.visit(made_hello(OTHER))
    async with world.online(made_hello()):
        assert [(view.agent.agent_id, view.is_online) for view in await world.fleet.agents()] == [
            (CAM, True),
            (OTHER, False),
        ]


async def test_an_agent_that_never_came_is_unknown(world: World) -> None:
    with pytest.raises(UnknownAgent, match="cam-1"):
        await world.fleet.agent(CAM)


async def test_a_report_is_shown_before_it_is_stored(world: World) -> None:
    async with world.online(made_hello()) as session:
        world.fleet.reported(session, made_report(NOWHERE, made_slot(), stored_bytes=7))

        assert (await world.fleet.agent(CAM)).agent.reported.slots[0].stored_bytes == 7


async def test_many_reports_of_many_agents_are_one_transaction() -> None:
    world = World(max_sessions=2000)
    sessions = [
        await world.fleet.session(made_hello(AgentId(f"agent-{number}"))).__aenter__() for number in range(2000)
    ]
    before = world.store.transactions
    for progress in range(10):
        for session, _ in sessions:
            world.fleet.reported(session, made_report(NOWHERE, made_slot(), stored_bytes=progress))

    await world.fleet.flush()

    assert world.store.transactions == before + 1
    assert {view.agent.reported.slots[0].stored_bytes for view in await world.fleet.agents()} == {9}


async def test_what_could_not_be_stored_is_stored_later(world: World) -> None:
    async with world.online(made_hello()) as session:
        world.fleet.reported(session, made_report(NOWHERE, made_slot()))
        world.store.fail_next = Unavailable("the disk is full")
        with pytest.raises(Unavailable):
            await world.fleet.flush()
        await world.fleet.flush()

    stored = await world.store.read(lambda records: records.agent(CAM))
    assert stored is not None
    assert stored.reported == made_report(NOWHERE, made_slot())


async def test_a_new_hello_outdates_what_was_heard_before_it(world: World) -> None:
    async with world.online(made_hello()) as session:
        await world.deploy()
        world.fleet.push_result(session, PushResult(FIRST))

    async with world.online(made_hello(boot_id="boot-2", applied=NOWHERE)) as session:
        await world.fleet.flush()

        assert (await world.fleet.agent(CAM)).agent.reported.applied == NOWHERE
        assert (await taken(session)).position == FIRST


async def test_a_change_wakes_those_who_wait_for_one(world: World) -> None:
    seen = world.fleet.revision
    waiting = asyncio.create_task(world.fleet.next_change(seen, timeout_s=5))
    await asyncio.sleep(0)

    await world.visit(made_hello())

    assert await waiting > seen


async def test_waiting_for_a_change_ends_without_one(world: World) -> None:
    assert await world.fleet.next_change(world.fleet.revision, timeout_s=0.001) == world.fleet.revision


# ---- sessions -------------------------------------------------------------------------------------------------


async def test_a_newer_session_of_the_same_agent_replaces_the_old_one(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.online(made_hello()) as old:
        async with world.online(made_hello(boot_id="boot-2")) as new:
            assert await old.take() == Replaced()
            world.fleet.reported(old, made_report(NOWHERE, made_slot()))
            assert is_idle(new)
            assert (await world.fleet.agent(CAM)).agent.reported.slots == ()
        assert not (await world.fleet.agent(CAM)).is_online

    assert "session replaced" in caplog.text


async def test_the_end_of_a_replaced_session_leaves_the_new_one_online(world: World) -> None:
    old = world.fleet.session(made_hello())
    await old.__aenter__()
    async with world.online(made_hello(boot_id="boot-2")):
        await old.__aexit__(None, None, None)

        assert (await world.fleet.agent(CAM)).is_online


async def test_sessions_are_bounded_and_replacing_one_takes_no_more_room() -> None:
    world = World(max_sessions=1)
    async with world.online(made_hello()):
        with pytest.raises(Overloaded, match="at most 1 sessions"):
            await world.visit(made_hello(OTHER))
        await world.visit(made_hello(boot_id="boot-2"))


async def test_a_hello_that_cannot_be_stored_leaves_no_session(world: World) -> None:
    world.store.fail_next = Unavailable("locked")

    with pytest.raises(Unavailable):
        await world.visit(made_hello())

    assert world.fleet.session_count == 0


async def test_stopping_ends_every_session(world: World) -> None:
    async with world.online(made_hello()) as one, world.online(made_hello(OTHER)) as other:
        world.fleet.end_sessions()

        assert [await one.take(), await other.take()] == [Stopping(), Stopping()]


async def test_the_loop_stores_what_was_heard(world: World) -> None:
    running = asyncio.create_task(world.fleet.run())
    async with world.online(made_hello()) as session, asyncio.timeout(5):
        world.store.committed.clear()
        world.fleet.reported(session, made_report(NOWHERE, made_slot()))
        await world.store.committed.wait()
    running.cancel()
    await asyncio.wait([running])

    stored = await world.store.read(lambda records: records.agent(CAM))
    assert stored is not None
    assert stored.reported == made_report(NOWHERE, made_slot())


async def test_two_machines_under_one_name_are_reported_once(world: World) -> None:
    reported: list[tuple[str, str]] = []
    world.fleet.on_decided(lambda action, target, _detail: reported.append((action, target)))
    for boot_id in ("boot-1", "boot-2"):
        await world.visit(made_hello(boot_id=boot_id))
    for _ in range(2):
        with pytest.raises(Quarantined):
            await world.visit(made_hello(boot_id="boot-1"))

    assert reported == [("agent.quarantine", CAM)]
