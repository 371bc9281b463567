"""What the controller signs is what an agent accepts: its catalogue and director against the agent's verification."""

from pathlib import Path

import pytest

from controller.signing.director import Director
from controller.signing.keys import KeyFiles, KeyRing
from controller.signing.model import KeyRole
from controller.signing.service import Catalogue
from core.clock import SystemClock
from core.errors import Untrusted
from core.fleet_state import NO_CATALOGUE, AgentHello, CatalogueVersions, DesiredState, Position, Slot
from core.ids import AgentId, SiteId
from edge_agent.trust.accepted import load_accepted
from edge_agent.trust.admission import ROOT, admit
from edge_agent.trust.question import Answer, Question
from edge_agent.trust.terms import ManifestTerms
from tests.support.catalogues import METER, MemoryCatalogueStore, made_release

AGENT = AgentId("gate-1")
CLOCK = SystemClock()
FIRST, SECOND = made_release(METER, 1), made_release(METER, 2)


class BothSides:
    """A controller that signs and an agent that began to trust it, with what rides along as the only way between."""

    def __init__(self, folder: Path) -> None:
        self.catalogue = Catalogue(MemoryCatalogueStore(), KeyRing(KeyFiles(folder / "keys")), clock=CLOCK)
        self.director = Director(self.catalogue, clock=CLOCK)
        self.trust = folder / "trust"

    async def enrol(self) -> None:
        await self.catalogue.prepare()
        self.trust.mkdir()
        (self.trust / ROOT).write_bytes(self.catalogue.export_root())

    @property
    def held(self) -> CatalogueVersions:
        return load_accepted(self.trust).versions

    async def admits(self, slot: Slot) -> Answer:
        hello = AgentHello(AGENT, SiteId("north"), "1.0", "boot", Position(0, 0), (), self.held)
        signed = await self.director.signed(DesiredState(AGENT, Position(1, 1), CLOCK.now(), (slot,)), hello)
        return admit(Question(self.trust, AGENT, signed), now=CLOCK.now(), live=None)


@pytest.fixture
async def sides(tmp_path: Path) -> BothSides:
    sides = BothSides(tmp_path)
    await sides.enrol()
    await sides.catalogue.release([FIRST])
    return sides


async def test_a_release_is_admitted_by_what_rides_along_alone(sides: BothSides) -> None:
    assert sides.held == NO_CATALOGUE
    assert FIRST.manifest_digest in (await sides.admits(FIRST.slot)).allowed
    assert sides.held.root == 1


async def test_an_agent_that_is_up_to_date_needs_no_metadata(sides: BothSides) -> None:
    await sides.admits(FIRST.slot)
    assert FIRST.manifest_digest in (await sides.admits(FIRST.slot)).allowed


async def test_the_next_release_is_admitted_after_the_first(sides: BothSides) -> None:
    await sides.admits(FIRST.slot)
    await sides.catalogue.release([SECOND])
    assert set((await sides.admits(SECOND.slot)).allowed) == {SECOND.manifest_digest}


@pytest.mark.parametrize("role", list(KeyRole))
async def test_every_key_can_be_replaced_under_an_agent(sides: BothSides, role: KeyRole) -> None:
    await sides.admits(FIRST.slot)
    await sides.catalogue.rotate(role)
    assert FIRST.manifest_digest in (await sides.admits(FIRST.slot)).allowed


async def test_a_revoked_version_is_refused(sides: BothSides) -> None:
    await sides.catalogue.release([SECOND])
    await sides.admits(FIRST.slot)
    await sides.catalogue.revoke(METER, versions=[1])
    with pytest.raises(Untrusted):
        await sides.admits(FIRST.slot)
    assert SECOND.manifest_digest in (await sides.admits(SECOND.slot)).allowed


async def test_what_is_below_the_floor_is_refused(sides: BothSides) -> None:
    await sides.catalogue.release([SECOND])
    await sides.catalogue.revoke(METER, below=2)
    with pytest.raises(Untrusted):
        await sides.admits(FIRST.slot)
    statement = (await sides.admits(SECOND.slot)).allowed[SECOND.manifest_digest]
    ManifestTerms(statement.length_bytes, statement.release_floor, frozenset()).require(SECOND.manifest)
