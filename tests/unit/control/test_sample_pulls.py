"""SamplePulls: who is asked, what is taken, what is bounded, and what is left after a restart."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controller.fleet.sessions import Session
from controller.samples.model import DeliveryState, PullRequest, PullView
from controller.samples.service import MAX_PULLS, MAX_RECEIVING_BYTES, PullBounds, SamplePulls
from controller.samples.spool import Spool
from core.digest import digest_of
from core.errors import (
    DiskFull,
    IntegrityError,
    InvalidRequest,
    NanofleetError,
    NotFound,
    Overloaded,
    Unavailable,
    UnknownAgent,
    UnknownModel,
)
from core.ids import AgentId, ModelName, SiteId
from core.samples import SampleCount, SampleCounts, SampleName, SampleOffer, SampleOrder
from tests.support.fleet_values import CAM, CAT, METER, NORTH, SOUTH, at_site, made_hello
from tests.unit.control.test_fleet_service import World

OTHER = AgentId("cam-2")
SAMPLES = [f"sample {number}".encode() for number in range(4)]


def name_of(content: bytes) -> SampleName:
    return SampleName(digest_of(content), len(content))


async def chunks_of(content: bytes, *, size: int = 3) -> AsyncIterator[bytes]:
    for at in range(0, len(content), size):
        yield content[at : at + size]


class Side:
    """Pulls over a fleet in memory and a spool on disk."""

    def __init__(self, world: World, folder: Path, bounds: PullBounds = PullBounds()) -> None:  # noqa: B008 (frozen)
        self.world = world
        self.folder = folder
        self.bounds = bounds
        self.pulls = self._made()

    def _made(self) -> SamplePulls:
        fleet = self.world.fleet
        return SamplePulls(Spool(self.folder), fleet, fleet.samples, clock=self.world.clock, bounds=self.bounds)

    async def restart(self) -> None:
        self.pulls.close()
        self.pulls = self._made()
        await self.pulls.prepare()

    async def pull(
        self,
        model: ModelName = METER,
        *,
        agents: tuple[AgentId, ...] = (),
        site: SiteId | None = None,
        limit: int = 10,
        lifetime_s: float = 3600.0,
    ) -> PullView:
        return await self.pulls.create(PullRequest(model, limit, lifetime_s, agents, site), asked_by="ada")

    async def deliver(self, pull: PullView, *contents: bytes, agent_id: AgentId = CAM) -> None:
        """Play an agent from its first offer to its last."""
        offer = SampleOffer(pull.pull.pull_id, tuple(map(name_of, contents)))
        for digest in await self.pulls.offer(agent_id, offer):
            content = next(each for each in contents if digest_of(each) == digest)
            await self.upload(pull, content, agent_id=agent_id)
        assert not await self.pulls.offer(agent_id, offer)

    async def upload(self, pull: PullView, content: bytes, *, agent_id: AgentId = CAM) -> None:
        await self.pulls.receive(agent_id, pull.pull.pull_id, name_of(content), chunks_of(content))


@pytest.fixture
async def side(tmp_path: Path) -> AsyncIterator[Side]:
    world = World()
    await world.visit(made_hello())
    await world.visit(made_hello(OTHER, site=SOUTH))
    await world.deploy(at_site(NORTH))
    made = Side(world, tmp_path / "samples")
    await made.pulls.prepare()
    yield made
    made.pulls.close()


async def taken(session: Session) -> SampleOrder:
    async with asyncio.timeout(5):
        while not isinstance(word := await session.take(), SampleOrder):
            pass
    return word


# ---- who is asked ---------------------------------------------------------------------------------------------


async def test_agents_that_run_the_model_are_asked_on_their_open_session(side: Side) -> None:
    async with side.world.online(made_hello()) as session:
        pull = (await side.pull()).pull
        assert await taken(session) == pull.order()
    assert pull.agents == (CAM,)


async def test_an_agent_that_was_offline_is_asked_when_it_returns_and_no_more_when_it_has_delivered(
    side: Side,
) -> None:
    pull = await side.pull()
    async with side.world.online(made_hello()) as session:
        assert await taken(session) == pull.pull.order()
    await side.deliver(pull, SAMPLES[0])
    assert not side.pulls.orders_for(CAM)


async def test_an_agent_that_has_samples_of_a_model_that_it_no_longer_runs_is_asked(side: Side) -> None:
    async with side.world.online(made_hello(OTHER, site=SOUTH)) as session:
        side.world.fleet.samples.heard(session, SampleCounts((SampleCount(CAT, 1, "tied", 3),)))
    assert (await side.pull(CAT)).pull.agents == (OTHER,)


async def test_a_site_or_named_agents_are_asked_alone(side: Side) -> None:
    await side.world.deploy()
    assert (await side.pull()).pull.agents == (CAM, OTHER)
    assert (await side.pull(site=SOUTH)).pull.agents == (OTHER,)
    assert (await side.pull(agents=(CAM,))).pull.agents == (CAM,)


async def test_nobody_to_ask_is_said(side: Side) -> None:
    with pytest.raises(UnknownModel):
        await side.pull(CAT)
    with pytest.raises(UnknownAgent):
        await side.pull(agents=(AgentId("ghost"),))


# ---- what comes -----------------------------------------------------------------------------------------------


async def test_what_was_delivered_can_be_fetched_byte_by_byte(side: Side) -> None:
    pull = await side.pull()
    await side.deliver(pull, *SAMPLES)
    delivery = side.pulls.pull(pull.pull.pull_id).deliveries[CAM]
    assert (delivery.state, delivery.offered, delivery.reason) == (DeliveryState.DELIVERED, 4, "")
    for content in SAMPLES:
        assert await side.pulls.content(pull.pull.pull_id, CAM, digest_of(content)) == content


async def test_what_comes_twice_is_kept_once(side: Side) -> None:
    pull = await side.pull()
    await side.deliver(pull, SAMPLES[0])
    await side.upload(pull, SAMPLES[0])
    await side.deliver(pull, SAMPLES[0])
    assert len(side.pulls.pull(pull.pull.pull_id).deliveries[CAM].samples) == 1


async def test_after_a_broken_transfer_only_the_rest_is_wanted(side: Side) -> None:
    pull = await side.pull()
    offer = SampleOffer(pull.pull.pull_id, tuple(map(name_of, SAMPLES)))
    await side.pulls.offer(CAM, offer)
    await side.upload(pull, SAMPLES[1])
    assert set(await side.pulls.offer(CAM, offer)) == {digest_of(SAMPLES[number]) for number in (0, 2, 3)}


async def test_an_agent_that_declines_says_why(side: Side) -> None:
    pull = await side.pull()
    assert not await side.pulls.offer(CAM, SampleOffer(pull.pull.pull_id, declined="metered"))
    delivery = side.pulls.pull(pull.pull.pull_id).deliveries[CAM]
    assert (delivery.state, delivery.reason) == (DeliveryState.DECLINED, "metered")


async def test_bytes_with_another_digest_are_refused_and_not_kept(side: Side) -> None:
    pull = await side.pull()
    await side.pulls.offer(CAM, SampleOffer(pull.pull.pull_id, (name_of(SAMPLES[0]),)))
    with pytest.raises(IntegrityError):
        await side.pulls.receive(CAM, pull.pull.pull_id, name_of(SAMPLES[0]), chunks_of(SAMPLES[1]))
    assert not side.pulls.pull(pull.pull.pull_id).deliveries[CAM].samples


@pytest.mark.parametrize("content", [SAMPLES[0][:-1], SAMPLES[0] + b"x"])
async def test_fewer_or_more_bytes_than_announced_are_refused(side: Side, content: bytes) -> None:
    pull = await side.pull()
    await side.pulls.offer(CAM, SampleOffer(pull.pull.pull_id, (name_of(SAMPLES[0]),)))
    with pytest.raises(InvalidRequest):
        await side.pulls.receive(CAM, pull.pull.pull_id, name_of(SAMPLES[0]), chunks_of(content))


async def test_what_was_not_wanted_is_refused(side: Side) -> None:
    pull = await side.pull()
    with pytest.raises(Unavailable, match="offer it first"):
        await side.upload(pull, SAMPLES[0])


async def test_an_agent_that_nobody_asked_can_neither_offer_nor_upload(side: Side) -> None:
    pull = await side.pull()
    offer = SampleOffer(pull.pull.pull_id, (name_of(SAMPLES[0]),))
    with pytest.raises(NotFound):
        await side.pulls.offer(OTHER, offer)
    with pytest.raises(NotFound):
        await side.upload(pull, SAMPLES[0], agent_id=OTHER)
    with pytest.raises(NotFound):
        await side.pulls.offer(CAM, SampleOffer("f" * 32))


async def test_an_agent_reads_nothing_of_what_others_delivered(side: Side) -> None:
    await side.world.deploy()
    pull = await side.pull()
    await side.deliver(pull, SAMPLES[0])
    with pytest.raises(NotFound):
        await side.pulls.content(pull.pull.pull_id, OTHER, digest_of(SAMPLES[0]))


# ---- bounds ---------------------------------------------------------------------------------------------------


async def test_more_than_was_asked_for_is_refused(side: Side) -> None:
    pull = await side.pull(limit=1)
    with pytest.raises(InvalidRequest, match="at most 1"):
        await side.pulls.offer(CAM, SampleOffer(pull.pull.pull_id, tuple(map(name_of, SAMPLES[:2]))))


@pytest.mark.parametrize("bounds", [PullBounds(pull_bytes=20), PullBounds(spool_bytes=20)])
async def test_only_what_there_is_room_for_is_wanted_and_the_rest_is_said(tmp_path: Path, bounds: PullBounds) -> None:
    world = World()
    await world.visit(made_hello())
    await world.deploy()
    side = Side(world, tmp_path / "samples", bounds)
    await side.pulls.prepare()
    pull = await side.pull()
    # 8 bytes each.
    await side.deliver(pull, *SAMPLES)
    delivery = side.pulls.pull(pull.pull.pull_id).deliveries[CAM]
    assert (len(delivery.samples), delivery.offered, delivery.reason) == (2, 4, "no_room")
    side.pulls.close()


async def test_pulls_are_bounded_in_number(side: Side) -> None:
    for _ in range(MAX_PULLS):
        await side.pull()
    with pytest.raises(Overloaded):
        await side.pull()


async def test_memory_for_what_is_being_received_is_bounded(side: Side) -> None:
    await side.world.deploy()
    pull = await side.pull(limit=100)
    size = 16 << 20
    agents = [CAM, OTHER]
    names = [SampleName(digest_of(f"{number}".encode()), size) for number in range(2)]
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        started.set()
        await asyncio.Event().wait()
        yield b""

    for agent in agents:
        await side.pulls.offer(agent, SampleOffer(pull.pull.pull_id, tuple(names)))
    async with asyncio.timeout(5):
        first = asyncio.create_task(side.pulls.receive(CAM, pull.pull.pull_id, names[0], endless()))
        await started.wait()
        # One at a time of each agent.
        with pytest.raises(Overloaded):
            await side.pulls.receive(CAM, pull.pull.pull_id, names[1], endless())
        first.cancel()
        await asyncio.wait([first])
    assert size * len(agents) < MAX_RECEIVING_BYTES
    await side.pulls.tidy()


async def test_a_disk_that_takes_nothing_is_said_and_may_be_tried_again(side: Side) -> None:
    pull = await side.pull()
    await side.pulls.offer(CAM, SampleOffer(pull.pull.pull_id, (name_of(SAMPLES[0]),)))
    # In the way of the agent's folder.
    (side.folder / pull.pull.pull_id / CAM).write_text("")
    with pytest.raises(DiskFull):
        await side.upload(pull, SAMPLES[0])
    (side.folder / pull.pull.pull_id / CAM).unlink()
    await side.upload(pull, SAMPLES[0])


# ---- time, restarts, removal ----------------------------------------------------------------------------------


async def test_a_pull_that_is_over_takes_and_shows_nothing_and_its_files_are_removed(side: Side) -> None:
    pull = await side.pull(lifetime_s=60.0)
    await side.deliver(pull, SAMPLES[0])
    side.world.clock.advance(60.0)
    with pytest.raises(NotFound):
        side.pulls.pull(pull.pull.pull_id)
    with pytest.raises(NotFound):
        await side.pulls.offer(CAM, SampleOffer(pull.pull.pull_id))
    assert not side.pulls.orders_for(CAM)
    await side.pulls.tidy()
    assert not list(side.folder.iterdir())


async def test_a_restart_loses_nothing(side: Side) -> None:
    await side.world.deploy()
    pull = await side.pull()
    await side.deliver(pull, *SAMPLES)
    await side.pulls.offer(OTHER, SampleOffer(pull.pull.pull_id, (name_of(SAMPLES[0]), name_of(SAMPLES[1]))))
    await side.upload(pull, SAMPLES[0], agent_id=OTHER)
    before = side.pulls.pull(pull.pull.pull_id)
    await side.restart()
    after = side.pulls.pull(pull.pull.pull_id)
    assert after.pull == before.pull
    assert after.deliveries[CAM] == before.deliveries[CAM]
    assert after.deliveries[OTHER].samples == before.deliveries[OTHER].samples
    assert [order.pull_id for order in side.pulls.orders_for(OTHER)] == [pull.pull.pull_id]
    assert not side.pulls.orders_for(CAM)


async def test_what_is_damaged_in_the_spool_is_removed_or_asked_for_again(side: Side) -> None:
    pull = await side.pull()
    await side.deliver(pull, SAMPLES[0])
    (side.folder / pull.pull.pull_id / CAM / "end.json").write_text("{")
    (side.folder / "notes").mkdir()
    (side.folder / ("f" * 32)).mkdir()
    (side.folder / ("f" * 32) / "pull.json").write_text("half")
    await side.restart()
    assert [each.pull.pull_id for each in side.pulls.pulls()] == [pull.pull.pull_id]
    assert side.pulls.pull(pull.pull.pull_id).deliveries[CAM].state is DeliveryState.DELIVERING
    assert [path.name for path in side.folder.iterdir()] == [pull.pull.pull_id]


async def test_a_pull_that_was_dropped_is_gone_with_all_that_came(side: Side) -> None:
    pull = await side.pull()
    await side.deliver(pull, SAMPLES[0])
    await side.pulls.drop(pull.pull.pull_id)
    assert not list(side.folder.iterdir())
    with pytest.raises(NotFound):
        await side.pulls.drop(pull.pull.pull_id)


async def test_what_arrives_for_a_pull_dropped_meanwhile_leaves_no_file(side: Side) -> None:
    pull = await side.pull()
    await side.pulls.offer(CAM, SampleOffer(pull.pull.pull_id, (name_of(SAMPLES[0]),)))

    async def slowly() -> AsyncIterator[bytes]:
        yield SAMPLES[0][:3]
        await side.pulls.drop(pull.pull.pull_id)
        yield SAMPLES[0][3:]

    with pytest.raises(NanofleetError):
        await side.pulls.receive(CAM, pull.pull.pull_id, name_of(SAMPLES[0]), slowly())
    assert not list(side.folder.iterdir())


async def test_whoever_waits_hears_of_a_sample(side: Side) -> None:
    pull = await side.pull()
    seen = side.pulls.revision
    waiting = asyncio.create_task(side.pulls.next_change(seen, timeout_s=5.0))
    await side.deliver(pull, SAMPLES[0])
    assert await waiting > seen


async def test_what_came_is_listed_in_the_order_in_which_it_did_from_any_place_on(side: Side) -> None:
    await side.world.deploy()
    pull = await side.pull()
    pull_id = pull.pull.pull_id
    await side.deliver(pull, SAMPLES[2])
    await side.deliver(pull, SAMPLES[0], agent_id=OTHER)
    await side.deliver(pull, SAMPLES[2], SAMPLES[1])
    listed = [(each.agent_id, each.digest) for each in side.pulls.samples(pull_id, start=0, limit=10)]
    assert listed == [(CAM, digest_of(SAMPLES[2])), (OTHER, digest_of(SAMPLES[0])), (CAM, digest_of(SAMPLES[1]))]
    assert [each.digest for each in side.pulls.samples(pull_id, start=1, limit=1)] == [digest_of(SAMPLES[0])]
    await side.restart()
    again = side.pulls.samples(pull_id, start=0, limit=10)
    assert {(each.agent_id, each.digest) for each in again} == set(listed)


# ---- what agents say they keep --------------------------------------------------------------------------------


async def test_counts_are_what_agents_last_said_until_their_name_is_given_away(side: Side) -> None:
    counts = SampleCounts((SampleCount(METER, 1, "tied", 3),), 0, 900)
    async with side.world.online(made_hello()) as session:
        side.world.fleet.samples.heard(session, SampleCounts())
        side.world.fleet.samples.heard(session, counts)
    assert side.pulls.counts() == {CAM: counts}
    side.world.fleet.expel(CAM, "banned")
    assert not side.pulls.counts()
