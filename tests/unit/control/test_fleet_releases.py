"""The fleet and the signed catalogue: what may be deployed, and telling agents again what holds."""

import asyncio

import pytest

from controller.fleet.model import WHOLE_FLEET
from controller.fleet.service import Fleet
from controller.fleet.sessions import Session
from core.errors import Conflict
from core.fleet_state import DesiredState, Position, Slot
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import INT8, METER, FakeCatalogue, HeldClock, made_hello

FIRST = Position(1, 1)


class FakeReleases:
    def __init__(self) -> None:
        self.refused: set[int] = set()

    def require_released(self, slot: Slot) -> None:
        if slot.version in self.refused:
            raise Conflict(f"model {slot.model} version {slot.version}: waits for signatures")


class World:
    def __init__(self) -> None:
        self.releases = FakeReleases()
        self.fleet = Fleet(
            MemoryFleetStore(), FakeCatalogue(), releases=self.releases, clock=HeldClock(), max_sessions=10
        )

    async def deploy(self, version: int) -> None:
        await self.fleet.deploy(WHOLE_FLEET, model=METER, version=version, variant=INT8)


@pytest.fixture
def world() -> World:
    return World()


async def taken(session: Session) -> Position:
    async with asyncio.timeout(1):
        desired = await session.take()
    assert isinstance(desired, DesiredState)
    return desired.position


async def gets_nothing(session: Session) -> bool:
    try:
        async with asyncio.timeout(0):
            await session.take()
    except TimeoutError:
        return True
    return False


async def test_what_is_not_released_is_not_deployed(world: World) -> None:
    world.releases.refused = {2}
    await world.deploy(1)

    with pytest.raises(Conflict, match="waits for signatures"):
        await world.deploy(2)

    assert [deployment.slot.version for deployment in await world.fleet.deployments()] == [1]


async def test_a_reissue_pushes_what_was_taken_at_the_same_position(world: World) -> None:
    async with world.fleet.session(made_hello()) as (session, _):
        await world.deploy(1)
        assert await taken(session) == FIRST

        await world.fleet.reissue()

        assert await taken(session) == FIRST


async def test_a_reissue_reaches_an_agent_that_was_in_sync_from_its_hello(world: World) -> None:
    async with world.fleet.session(made_hello()):
        await world.deploy(1)
    async with world.fleet.session(made_hello(applied=FIRST, boot_id="boot-1")) as (session, _):
        assert await gets_nothing(session)

        await world.fleet.reissue()

        assert await taken(session) == FIRST


async def test_a_reissue_never_puts_an_older_state_into_the_outbox(world: World) -> None:
    async with world.fleet.session(made_hello()) as (session, _):
        await world.deploy(1)
        old = (await world.fleet.agent(session.agent_id)).agent.desired
        await world.deploy(2)

        session.reissue(old)

        assert await taken(session) == Position(1, 2)


async def test_an_agent_that_is_ahead_or_was_asked_for_nothing_is_not_reissued(world: World) -> None:
    async with world.fleet.session(made_hello()) as (session, _):
        await world.fleet.reissue()
        assert await gets_nothing(session)
    async with world.fleet.session(made_hello(applied=Position(3, 3))) as (session, _):
        await world.fleet.reissue()
        assert await gets_nothing(session)
