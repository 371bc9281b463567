"""What operators are shown of an agent: every phase by its name, and what a transfer cost and saved."""

from dataclasses import replace

import pytest

from controller.api.operator_mapping import agent_view
from controller.api.operator_views import SlotReportView
from controller.cli.devices import PHASE_STYLE, phase_text
from controller.fleet.model import AgentView
from core.fleet_state import Position, Problem, ReportedState, SlotPhase, SlotReport, Transfer
from tests.support.fleet_values import made_agent, made_slot

TRANSFER = Transfer(
    wire_bytes=300, brought_bytes=1000, rate_bytes_per_s=50, same_chunks=1, zstd_chunks=2, difference_chunks=3
)


def shown(report: SlotReport) -> SlotReportView:
    agent = replace(made_agent(), reported=ReportedState(Position(1, 2), (report,)))
    [view] = agent_view(AgentView(agent, is_online=True)).slots
    return view


@pytest.mark.parametrize("phase", SlotPhase)
def test_every_phase_is_shown_by_its_name_in_a_colour(phase: SlotPhase) -> None:
    view = shown(SlotReport(made_slot(), phase, 25, 100))

    assert view.phase == phase.value
    assert view.phase in PHASE_STYLE
    assert phase_text(view) == ("fetching 25%" if phase is SlotPhase.FETCHING else phase.value.replace("_", "-"))


def test_a_slot_that_waits_says_for_what() -> None:
    problem = Problem("permission_required", "metered link: 48 MB")

    view = shown(SlotReport(made_slot(), SlotPhase.WAITING, 0, 100, problem))

    assert view.problem is not None
    assert (view.problem.code, view.problem.message) == ("permission_required", "metered link: 48 MB")


def test_a_transfer_is_shown_with_what_it_saved() -> None:
    view = shown(SlotReport(made_slot(), SlotPhase.FETCHING, 30, 100, transfer=TRANSFER))

    assert view.transfer is not None
    assert (view.transfer.wire_bytes, view.transfer.saved_bytes) == (300, 700)
    assert (view.transfer.same_chunks, view.transfer.difference_chunks) == (1, 3)
    assert phase_text(view) == "fetching 30% at 50 B/s"


def test_more_bytes_than_were_brought_saved_nothing() -> None:
    report = SlotReport(made_slot(), SlotPhase.READY, 100, 100, transfer=Transfer(wire_bytes=110, brought_bytes=100))

    view = shown(report)

    assert view.transfer is not None
    assert view.transfer.saved_bytes == 0
