"""What the controller signs, judged by the agent's own verification, with no more than what came along."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from controller.signing.director import Director
from controller.signing.model import KeyRole
from core.errors import Unavailable, Untrusted
from core.fleet_state import AgentHello, CatalogueVersions, DesiredState, Position, SignedAssignment
from core.ids import AgentId, SiteId
from edge_agent.trust.accepted import load_accepted
from edge_agent.trust.admission import ROOT, admit
from edge_agent.trust.question import Answer, Question
from tests.support.catalogues import CAT, METER, START, Release, SignedWorld, made_release

FIRST = made_release(METER, 1)
SECOND = made_release(METER, 2)
CAT_FIRST = made_release(CAT, 1)
AGENT = AgentId("cam-1")


@dataclass
class Agent:
    """An agent that enrolled at the first root, and says in every hello what it holds."""

    world: SignedWorld
    director: Director
    folder: Path
    generation: int = 0

    async def assignment(self, *releases: Release) -> SignedAssignment:
        self.generation += 1
        slots = tuple(release.slot for release in releases)
        desired = DesiredState(AGENT, Position(1, self.generation), START, slots)
        hello = AgentHello(AGENT, SiteId("north"), "0.1.0", "boot-1", Position(0, 0), (), catalogue=self.held())
        return await self.director.signed(desired, hello)

    def held(self) -> CatalogueVersions:
        return load_accepted(self.folder).versions

    def judge(self, signed: SignedAssignment) -> Answer:
        return admit(Question(self.folder, AGENT, signed), now=self.world.clock.now(), live=None)


@pytest.fixture
async def world(tmp_path: Path) -> SignedWorld:
    world = SignedWorld(tmp_path / "controller")
    await world.catalogue.prepare()
    await world.catalogue.release([FIRST])
    return world


@pytest.fixture
async def agent(world: SignedWorld, tmp_path: Path) -> Agent:
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / ROOT).write_bytes(world.catalogue.export_root())
    return Agent(world, Director(world.catalogue, clock=world.clock), folder)


async def test_a_first_assignment_is_admitted(world: SignedWorld, agent: Agent) -> None:
    answer = agent.judge(await agent.assignment(FIRST))

    statement = answer.allowed[FIRST.manifest_digest]
    assert (statement.length_bytes, statement.release_floor) == (len(FIRST.manifest.to_bytes()), 1)
    assert agent.held() == world.catalogue.versions()


async def test_an_agent_that_is_up_to_date_takes_a_model_it_never_had(world: SignedWorld, agent: Agent) -> None:
    await world.catalogue.release([CAT_FIRST])
    agent.judge(await agent.assignment(FIRST))

    signed = await agent.assignment(FIRST, CAT_FIRST)

    assert len(signed.catalogue) == 2
    assert set(agent.judge(signed).allowed) == {FIRST.manifest_digest, CAT_FIRST.manifest_digest}


@pytest.mark.parametrize("role", list(KeyRole))
async def test_an_agent_follows_a_rotation(world: SignedWorld, agent: Agent, role: KeyRole) -> None:
    agent.judge(await agent.assignment(FIRST))

    await world.catalogue.rotate(role)
    await world.catalogue.release([SECOND])

    assert SECOND.manifest_digest in agent.judge(await agent.assignment(SECOND)).allowed


async def test_an_agent_that_begins_after_a_rotation_follows_the_next(world: SignedWorld, agent: Agent) -> None:
    await world.catalogue.rotate(KeyRole.ROOT)
    (agent.folder / ROOT).write_bytes(world.catalogue.export_root())
    assert FIRST.manifest_digest in agent.judge(await agent.assignment(FIRST)).allowed

    await world.catalogue.rotate(KeyRole.ROOT)

    assert FIRST.manifest_digest in agent.judge(await agent.assignment(FIRST)).allowed
    assert agent.held() == world.catalogue.versions()


async def test_an_agent_that_was_away_for_months_follows_every_rotation(world: SignedWorld, agent: Agent) -> None:
    agent.judge(await agent.assignment(FIRST))
    for _ in range(50):
        world.clock.advance(days=4)
        await world.catalogue.renew()
        await world.catalogue.rotate(KeyRole.TARGETS)

    assert FIRST.manifest_digest in agent.judge(await agent.assignment(FIRST)).allowed


async def test_a_revoked_version_is_refused_though_the_director_signs_it(world: SignedWorld, agent: Agent) -> None:
    await world.catalogue.release([SECOND])
    await world.catalogue.revoke(METER, versions=[1])

    with pytest.raises(Untrusted, match="withdrawn"):
        agent.judge(await agent.assignment(FIRST))

    assert agent.judge(await agent.assignment(SECOND)).allowed[SECOND.manifest_digest].release_floor == 2


async def test_what_is_only_staged_is_refused(world: SignedWorld, agent: Agent) -> None:
    world.move_keys(KeyRole.TARGETS)
    await world.catalogue.release([SECOND])

    with pytest.raises(Untrusted):
        agent.judge(await agent.assignment(SECOND))


async def test_an_assignment_for_another_agent_or_with_another_key_is_refused(world: SignedWorld, agent: Agent) -> None:
    signed = await agent.assignment(FIRST)

    with pytest.raises(Untrusted):
        agent.judge(replace(signed, key_id="0" * 64))
    with pytest.raises(Untrusted):
        admit(Question(agent.folder, AgentId("cam-2"), signed), now=START, live=None)


async def test_an_old_assignment_is_refused_after_its_month(world: SignedWorld, agent: Agent) -> None:
    signed = await agent.assignment(FIRST)
    world.clock.advance(days=31)

    with pytest.raises((Untrusted, Unavailable), match="expire"):
        agent.judge(signed)
