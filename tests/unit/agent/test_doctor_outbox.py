"""What the doctor says of the outbox: the disk, what was lost, what was damaged."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from core.doctor import Verdict
from edge_agent.doctor.outbox import outbox_takes_rows
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import (
    AgentIdentity,
    AgentStatus,
    CertificateView,
    OutboxView,
    PeerView,
    WaitingView,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LOST = WaitingView(rows=3, size_bytes=9, oldest_age_s=1.0, sent=0, lost={"age": 7})


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path)


def running(folder: StateFolder, outbox: OutboxView) -> None:
    """Let an agent have written its status."""
    status = AgentStatus(
        agent=AgentIdentity(agent_id="gate-1", site="berlin", software_version="1", boot_id="b", pid=1, started_at=NOW),
        controller=PeerView(address="127.0.0.1:1", state="closed", is_connected=False, since=NOW),
        broker=None,
        certificate=CertificateView(not_after=NOW),
        epoch=1,
        generation=1,
        models=(),
        heavy_breaker="closed",
        outbox=outbox,
        counters={},
        written_at=NOW,
    )
    folder.status.write_text(status.model_dump_json())


@pytest.mark.parametrize("trouble", ["full", "read_only", "faulty"])
def test_a_disk_that_takes_nothing_is_a_problem_with_a_remedy(folder: StateFolder, trouble: str) -> None:
    running(folder, OutboxView(trouble=trouble))
    found = outbox_takes_rows(folder, is_running=True)

    assert (found.verdict, trouble in found.found, bool(found.remedy)) == (Verdict.PROBLEM, True, True)


def test_rows_that_were_lost_are_a_warning(folder: StateFolder) -> None:
    running(folder, OutboxView(kinds={"telemetry": LOST}))
    found = outbox_takes_rows(folder, is_running=True)

    assert (found.verdict, found.found) == (Verdict.WARNING, "telemetry: 3 wait, 0 sent, 7 lost (age)")


@pytest.mark.parametrize("is_running", [True, False])
def test_a_database_that_was_set_aside_is_a_warning(folder: StateFolder, is_running: bool) -> None:
    running(folder, OutboxView())
    folder.outbox.with_name("outbox.corrupt-5").write_bytes(b"")

    assert outbox_takes_rows(folder, is_running=is_running).verdict is Verdict.WARNING


def test_an_outbox_without_trouble_is_fine(folder: StateFolder) -> None:
    running(folder, OutboxView())

    assert outbox_takes_rows(folder, is_running=True).verdict is Verdict.OK
    assert outbox_takes_rows(folder, is_running=False).verdict is Verdict.SKIPPED
