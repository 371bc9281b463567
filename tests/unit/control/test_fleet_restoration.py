"""A fleet whose state came from a backup: it is watched until an operator has confirmed that."""

from datetime import timedelta
from functools import partial

import pytest

from controller.fleet import use_cases
from core.errors import Conflict
from core.fleet_state import NO_CATALOGUE, CatalogueVersions, Position
from tests.support.fleet_values import CAM, CAT, METER, NOON, made_hello, made_report, made_slot
from tests.unit.control.test_fleet_service import FIRST, OTHER, SECOND, World, is_idle, taken

YESTERDAY = NOON - timedelta(days=1)


async def restored() -> World:
    """Return a fleet that gave CAM its first position, and was then brought back from a backup."""
    world = World()
    await world.deploy()
    await world.visit(made_hello())
    world.clock.advance(60)
    mark = partial(use_cases.mark_restored, backup_at=YESTERDAY, now=world.clock.now(), above_epoch=0)
    await world.store.run(mark)
    await world.fleet.prepare()
    return world


async def test_nothing_is_pushed_to_anybody() -> None:
    world = await restored()
    async with world.online(made_hello()) as behind, world.online(made_hello(OTHER)) as new:
        await world.fleet.reissue()

        assert (is_idle(behind), is_idle(new)) == (True, True)
    assert await world.position(OTHER) == (0, 0)


async def test_nothing_is_deployed_and_the_refusal_says_what_to_do() -> None:
    world = await restored()
    with pytest.raises(Conflict, match="confirm-restore"):
        await world.deploy(version=2)

    assert [each.slot.version for each in await world.fleet.deployments()] == [1]


async def test_after_the_word_agents_that_are_behind_get_what_they_shall_run() -> None:
    world = await restored()
    async with world.online(made_hello()) as behind, world.online(made_hello(OTHER)) as new:
        confirmed = await world.fleet.confirm_restored()

        assert (await taken(behind)).position == FIRST
        assert (await taken(new)).position == Position(confirmed.epoch, 1)
    assert not world.fleet.is_watching


async def test_after_the_word_an_agent_that_is_ahead_keeps_what_it_runs_until_the_next_deployment() -> None:
    world = await restored()
    async with world.online(made_hello(applied=SECOND)) as ahead:
        await world.fleet.confirm_restored()
        assert is_idle(ahead)
        await world.deploy(version=2)

        desired = await taken(ahead)
    assert (desired.position, desired.slots) == (Position(2, 1), (made_slot(METER, 2),))


async def test_a_deployment_of_another_model_rolls_nothing_back_in_passing() -> None:
    world = await restored()
    async with world.online(made_hello(applied=SECOND)) as ahead:
        world.fleet.reported(ahead, made_report(SECOND, made_slot(METER, 2)))
        await world.fleet.confirm_restored()
        await world.deploy(model=CAT)
        assert is_idle(ahead)
        await world.deploy(version=1)

        assert (await taken(ahead)).slots == (made_slot(CAT, 1), made_slot(METER, 1))


async def test_a_model_that_this_state_never_heard_of_is_not_taken_from_an_agent() -> None:
    world = await restored()
    async with world.online(made_hello(applied=SECOND)) as ahead:
        world.fleet.reported(ahead, made_report(SECOND, made_slot(METER, 1), made_slot(CAT, 1)))
        await world.fleet.confirm_restored()
        await world.deploy(version=2)

        assert is_idle(ahead)


async def test_an_agent_that_was_away_meanwhile_is_passed_by_until_it_comes() -> None:
    world = await restored()
    await world.fleet.confirm_restored()
    await world.deploy(model=CAT)
    async with world.online(made_hello(applied=SECOND)) as ahead:
        assert is_idle(ahead)


async def test_an_agent_that_was_away_and_is_not_ahead_gets_all_when_it_comes() -> None:
    world = await restored()
    await world.fleet.confirm_restored()
    await world.deploy(model=CAT)
    async with world.online(made_hello(applied=FIRST)) as behind:
        assert (await taken(behind)).slots == (made_slot(CAT, 1), made_slot(METER, 1))


async def test_the_epoch_passes_one_that_an_agent_tells_of() -> None:
    world = await restored()
    await world.visit(made_hello(applied=Position(5, 3)))

    assert (await world.fleet.confirm_restored()).epoch == 6


async def test_a_restore_is_confirmed_once() -> None:
    world = await restored()
    await world.fleet.confirm_restored()
    with pytest.raises(Conflict, match="there is none"):
        await world.fleet.confirm_restored()
    with pytest.raises(Conflict, match="there is none"):
        await World().fleet.confirm_restored()


async def test_a_controller_that_starts_again_still_watches_or_not() -> None:
    world = await restored()
    await world.fleet.prepare()
    assert world.fleet.is_watching
    await world.fleet.confirm_restored()
    await world.fleet.prepare()
    assert not world.fleet.is_watching


async def test_the_drift_names_who_is_ahead_and_who_was_not_heard_of() -> None:
    world = await restored()
    before = await world.fleet.drift()
    await world.visit(made_hello(applied=SECOND))
    after = await world.fleet.drift()

    assert ([agent.agent_id for agent in before.ahead], before.unheard) == ([], (CAM,))
    assert ([agent.agent_id for agent in after.ahead], after.unheard) == ([CAM], ())


async def test_an_agent_that_is_ahead_is_told_of_without_a_restore_too() -> None:
    world = World()
    await world.visit(made_hello(applied=SECOND))

    drift = await world.fleet.drift()
    assert ([agent.agent_id for agent in drift.ahead], drift.restoration) == ([CAM], None)


async def test_the_newest_catalogue_that_agents_hold_is_remembered() -> None:
    world = World()
    assert world.fleet.seen_catalogue == NO_CATALOGUE
    await world.visit(made_hello())

    assert world.fleet.seen_catalogue == CatalogueVersions(0, 0)
