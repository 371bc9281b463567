"""A person's word that a metered agent may fetch whole chunks: to whom it goes, and how long it holds."""

import asyncio

import pytest

from controller.fleet.model import WHOLE_FLEET
from controller.fleet.service import Fleet
from controller.fleet.sessions import Permitted, Session
from core.errors import UnknownAgent, UnknownModel
from core.fleet_state import DesiredState, Position
from core.ids import AgentId
from tests.support.fleet_store import MemoryFleetStore
from tests.support.fleet_values import CAM, CAT, INT8, METER, FakeCatalogue, HeldClock, made_hello, made_slot
from tests.support.releases import OpenCatalogue

FIRST = Position(1, 1)
ALLOWED = Permitted(made_slot(METER, 1).manifest_digest)


@pytest.fixture
async def fleet() -> Fleet:
    """One that asked its whole fleet to run version 1 of METER, and knows one agent that does."""
    fleet = Fleet(MemoryFleetStore(), FakeCatalogue(), releases=OpenCatalogue(), clock=HeldClock(), max_sessions=10)
    await fleet.deploy(WHOLE_FLEET, model=METER, version=1, variant=INT8)
    async with fleet.session(made_hello()):
        pass
    return fleet


async def taken(session: Session) -> object:
    async with asyncio.timeout(1):
        return await session.take()


async def test_a_permission_reaches_an_agent_that_is_online(fleet: Fleet) -> None:
    async with fleet.session(made_hello(applied=FIRST)) as (session, _):
        slot = await fleet.permit_transfer(CAM, METER)

        assert slot == made_slot(METER, 1)
        assert await taken(session) == ALLOWED


async def test_a_permission_waits_for_an_agent_that_is_offline(fleet: Fleet) -> None:
    await fleet.permit_transfer(CAM, METER)

    for _ in range(2):
        async with fleet.session(made_hello(applied=FIRST)) as (session, _):
            assert await taken(session) == ALLOWED


async def test_a_permission_follows_the_state_that_it_is_about(fleet: Fleet) -> None:
    async with fleet.session(made_hello()) as (session, _):
        await fleet.permit_transfer(CAM, METER)

        assert isinstance(await taken(session), DesiredState)
        assert await taken(session) == ALLOWED


async def test_a_permission_given_twice_is_told_once(fleet: Fleet) -> None:
    async with fleet.session(made_hello(applied=FIRST)) as (session, _):
        await fleet.permit_transfer(CAM, METER)
        await fleet.permit_transfer(CAM, METER)
        assert await taken(session) == ALLOWED

        await fleet.deploy(WHOLE_FLEET, model=METER, version=2, variant=INT8)

        assert isinstance(await taken(session), DesiredState)


async def test_the_next_version_needs_a_word_of_its_own(fleet: Fleet) -> None:
    await fleet.permit_transfer(CAM, METER)
    await fleet.deploy(WHOLE_FLEET, model=METER, version=2, variant=INT8)

    async with fleet.session(made_hello(applied=FIRST)) as (session, _):
        assert isinstance(await taken(session), DesiredState)
        assert await taken(session) == ALLOWED
        await fleet.permit_transfer(CAM, METER)
        assert await taken(session) == Permitted(made_slot(METER, 2).manifest_digest)


async def test_what_an_agent_shall_not_run_cannot_be_permitted(fleet: Fleet) -> None:
    with pytest.raises(UnknownModel, match="deploy it first"):
        await fleet.permit_transfer(CAM, CAT)


async def test_an_agent_that_never_came_cannot_be_permitted_anything(fleet: Fleet) -> None:
    with pytest.raises(UnknownAgent):
        await fleet.permit_transfer(AgentId("ghost"), METER)
