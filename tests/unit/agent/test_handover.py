"""A state folder that changes hands: nothing of another agent or fleet is left, whenever the power fails."""

import hashlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.addresses import Address
from core.clock import SystemClock
from core.errors import Untrusted
from core.fleet_state import DesiredState, Position
from core.ids import AgentId
from edge_agent.activation.journal import Journal
from edge_agent.activation.record import Record
from edge_agent.health.handover import making_room, require_root_of
from edge_agent.health.state_folder import StateFolder
from edge_agent.identity.folder import Identity, IdentityFolder, NotEnrolled
from tests.support.enrolled import enrolled
from tests.support.variants import made_variant

ROOT, OTHER_ROOT = b"a root", b"another root"


class Machine:
    """Agent gate-1, which has run a model."""

    def __init__(self, root: Path) -> None:
        self.folder = StateFolder(root)
        self.identity = enrolled(root, controller=Address("127.0.0.1", 7443), agent_id="gate-1", root=ROOT)
        self.folder.trust.mkdir()
        self.folder.root.write_bytes(ROOT)
        (self.folder.trust / "accepted.json").write_text("{}")
        state = DesiredState(
            AgentId("gate-1"), Position(1, 1), datetime(2026, 1, 2, tzinfo=UTC), (made_variant().slot,)
        )
        self.journal().save_active(state)
        self.journal().save_active(replace(state, position=Position(1, 2)))

    def journal(self) -> Journal:
        return Journal(self.folder.journal, clock=SystemClock())

    def is_enrolled(self) -> bool:
        try:
            IdentityFolder(self.folder.identity).load()
        except NotEnrolled:
            return False
        return True

    def wants(self, *, agent_id: str = "gate-1", root: bytes = ROOT) -> Identity:
        return replace(self.identity, agent_id=AgentId(agent_id), root_sha256=hashlib.sha256(root).hexdigest())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "state")


def test_the_same_agent_of_the_same_fleet_keeps_everything(machine: Machine) -> None:
    before = machine.journal().record
    making_room(machine.folder)(machine.wants())
    assert machine.is_enrolled()
    assert machine.journal().record == before
    assert (machine.folder.trust / "accepted.json").exists()


def test_another_agent_of_the_same_fleet_keeps_what_the_fleet_trusts_and_no_journal(machine: Machine) -> None:
    making_room(machine.folder)(machine.wants(agent_id="gate-2"))
    assert not machine.is_enrolled(), "the power may fail here"
    assert machine.journal().record == Record()
    assert (machine.folder.trust / "accepted.json").exists()


def test_another_fleet_leaves_neither_journal_nor_trust(machine: Machine) -> None:
    making_room(machine.folder)(machine.wants(root=OTHER_ROOT))
    assert not machine.is_enrolled(), "the power may fail here"
    assert machine.journal().record == Record()
    assert not machine.folder.trust.exists()


@pytest.mark.parametrize("name", ["journal", "root.json"])
def test_what_was_cut_off_half_way_is_finished_by_the_next_try(machine: Machine, name: str) -> None:
    IdentityFolder(machine.folder.identity).give_up()
    if name == "journal":
        machine.journal().reset()
    else:
        machine.folder.root.unlink()
    making_room(machine.folder)(machine.wants(root=OTHER_ROOT))
    assert machine.journal().record == Record()
    assert not machine.folder.trust.exists()


def test_a_journal_that_was_reset_does_not_come_back_when_its_file_breaks(machine: Machine) -> None:
    machine.journal().reset()
    for file in machine.folder.journal.iterdir():
        file.write_bytes(b"half")
    assert machine.journal().record == Record()


def test_an_agent_with_the_root_of_another_fleet_is_refused_with_the_remedy(machine: Machine) -> None:
    require_root_of(machine.identity, machine.folder.root)
    machine.folder.root.write_bytes(OTHER_ROOT)
    with pytest.raises(Untrusted, match="enrol again: nanofleet-agent enrol TOKEN --force"):
        require_root_of(machine.identity, machine.folder.root)


def test_without_a_root_what_runs_may_go_on(machine: Machine) -> None:
    machine.folder.root.unlink()
    require_root_of(machine.identity, machine.folder.root)
