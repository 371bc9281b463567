"""The status file and the command that shows it."""

import asyncio
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core.atomic_files import write_atomically
from core.clock import SystemClock
from core.errors import Conflict, InvalidRequest, NotFound
from core.fleet_state import Energy, EnergyMethod, Position, Problem, ReportedState, SlotPhase, SlotReport
from edge_agent.health.report import ExitCode, render, show_status
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import (
    COUNTERS_INTERVAL_S,
    AgentIdentity,
    AgentStatus,
    CertificateView,
    MemoryView,
    PeerView,
    ResidencyView,
    StatusWriter,
    read_status,
)
from tests.support.variants import made_variant

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
AGENT = AgentIdentity(
    agent_id="gate-1",
    site="berlin",
    software_version="0.1.0",
    boot_id="b",
    pid=4711,
    started_at=NOW - timedelta(hours=3),
)
CONTROLLER = PeerView(address="127.0.0.1:7443", state="open", is_connected=True, since=NOW - timedelta(minutes=5))
BROKER_AWAY = PeerView(
    address="127.0.0.1:1883",
    state="waiting",
    is_connected=False,
    since=NOW - timedelta(seconds=42),
    last_error="connection refused",
)
CERTIFICATE = CertificateView(not_after=NOW + timedelta(days=3, hours=12))
FAILED = SlotReport(
    made_variant().slot, SlotPhase.FAILED, 1 << 20, 2 << 20, Problem("integrity", "expected sha256:a, got sha256:b")
)


def status(
    *,
    broker: PeerView | None = BROKER_AWAY,
    certificate: CertificateView = CERTIFICATE,
    clock_problem: str = "",
    memory: MemoryView | None = None,
    expired: int = 0,
    energy: Energy | None = None,
    now: datetime = NOW,
) -> AgentStatus:
    reported = ReportedState(Position(1, 7), (FAILED,))
    return AgentStatus.of(
        AGENT,
        reported,
        controller=CONTROLLER,
        broker=broker,
        certificate=certificate,
        heavy_breaker="closed",
        clock_problem=clock_problem,
        memory=memory,
        counters={"expired": expired},
        energy=energy,
        now=now,
    )


def shown(found: AgentStatus, *, is_running: bool = True) -> str:
    return "\n".join(render(found, is_running=is_running, now=NOW + timedelta(seconds=3)))


def test_a_clock_that_contradicts_the_catalogue_is_shown_until_it_is_set() -> None:
    assert "clock       at least 9.0 h behind" in shown(status(clock_problem="at least 9.0 h behind"))
    assert "clock" not in shown(status())


def test_a_broker_that_is_away_is_shown_with_its_error_and_that_it_is_tried_again() -> None:
    assert "broker      127.0.0.1:1883 away (waiting) for 45.0 s; connection refused; trying again" in shown(status())


def test_a_planned_retry_is_shown_with_its_time() -> None:
    away = BROKER_AWAY.model_copy(update={"retry_at": NOW + timedelta(seconds=10)})
    assert "trying again in 7.0 s" in shown(status(broker=away))


def test_a_connection_is_shown_with_its_age() -> None:
    assert "controller  127.0.0.1:7443 connected for 5 min 3 s" in shown(status())


def test_a_broker_that_is_switched_off_is_shown_as_such() -> None:
    assert "broker      switched off" in shown(status(broker=None))


def test_a_certificate_is_shown_with_how_long_it_is_good() -> None:
    assert "certificate good for 3 d 11 h" in shown(status())


def test_a_certificate_that_could_not_be_renewed_is_shown_with_the_reason() -> None:
    failed = CertificateView(not_after=NOW, last_error="enrol it again with --force", clock_problem="set the clock")
    assert "certificate expired; enrol it again with --force; set the clock" in shown(status(certificate=failed))


def test_a_failed_model_is_shown_with_its_problem() -> None:
    assert "failed  1.0/2.0 MiB  -       integrity: expected sha256:a, got sha256:b" in shown(status())


def in_memory(state: str, taken_bytes: int, reason: str = "") -> MemoryView:
    models = {FAILED.slot.model: ResidencyView(state=state, taken_bytes=taken_bytes, reason=reason)}
    return MemoryView(budget_bytes=100 << 20, taken_bytes=taken_bytes, models=models)


def test_what_models_take_of_their_budget_is_shown() -> None:
    text = shown(status(memory=in_memory("resident", 25 << 20)))
    assert "memory      models take 25.0 MiB of 100.0 MiB; 1 of 1 resident" in text
    assert "resident 25.0 MiB" in text


def test_a_model_out_of_memory_is_shown_as_such() -> None:
    assert " cold " in shown(status(memory=in_memory("cold", 0, "not resident: a request brings it in")))


def test_what_comes_and_goes_in_memory_does_not_wear_the_flash_out() -> None:
    before, after = status(memory=in_memory("cold", 0)), status(memory=in_memory("resident", 5))
    assert not after.differs_from(before, age_s=1.0)
    assert after.differs_from(before, age_s=10.0)


def test_counters_and_position_are_shown() -> None:
    text = shown(status(expired=12))
    assert "epoch 1, generation 7 applied" in text
    assert "expired  12" in text


def test_process_and_age_of_the_file_are_shown() -> None:
    assert "running as process 4711 for 3 h 0 min; status written 3.0 s ago" in shown(status())


def test_a_dead_agent_is_shown_as_not_running() -> None:
    text = shown(status(), is_running=False)
    assert "NOT RUNNING" in text
    assert "trying again" not in text


async def written(path: Path, *, times: list[AgentStatus]) -> list[bytes]:
    """Let a writer see the statuses one after the other; return what is in the file after each."""
    contents, script = [], list(times)
    with ThreadPoolExecutor(1) as disk:
        writer = StatusWriter(path, lambda: script.pop(0), disk=disk, clock=SystemClock())
        for _ in times:
            await writer.write_if_changed()
            contents.append(path.read_bytes())
    return contents


async def test_a_status_can_be_read_back(tmp_path: Path) -> None:
    await written(tmp_path / "status.json", times=[status()])
    assert read_status(tmp_path / "status.json") == status()


async def test_a_change_is_written(tmp_path: Path) -> None:
    first, second = await written(tmp_path / "status.json", times=[status(), status(broker=None)])
    assert first != second


async def test_nothing_is_written_while_only_the_time_goes_by(tmp_path: Path) -> None:
    first, second = await written(tmp_path / "status.json", times=[status(), status(now=NOW + timedelta(seconds=1))])
    assert first == second


def test_counters_alone_are_written_seldom() -> None:
    before, after = status(expired=1), status(expired=2)
    assert not after.differs_from(before, age_s=COUNTERS_INTERVAL_S - 1)
    assert after.differs_from(before, age_s=COUNTERS_INTERVAL_S)


def took(joules: float, *, answers: int = 20, recent_answers: int = 10) -> Energy:
    return Energy(EnergyMethod.MODEL, joules, answers, 0.5, 4.0, recent_answers)


def test_energy_is_shown_with_the_method_that_it_is_known_by() -> None:
    text = shown(status(energy=took(9.0)))
    assert "energy      model: 0.5 W and 0.4 J an answer over the last minute; 9 J for 20 answers" in text
    assert "model: 0.5 W and no answers over the last minute" in shown(status(energy=took(9.0, recent_answers=0)))
    assert "energy" not in shown(status())


def test_joules_without_an_answer_are_no_reason_to_write() -> None:
    before = status(energy=took(9.0))
    assert not status(energy=took(9.5)).differs_from(before, age_s=COUNTERS_INTERVAL_S)
    assert status(energy=took(9.5, answers=21)).differs_from(before, age_s=COUNTERS_INTERVAL_S)
    assert not status(energy=took(9.5, answers=21)).differs_from(before, age_s=COUNTERS_INTERVAL_S - 1)


def test_a_folder_without_an_agent_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFound):
        read_status(tmp_path / "status.json")
    assert show_status(StateFolder(tmp_path), as_json=False) is ExitCode.NO_STATUS
    assert "no agent has written its status here" in capsys.readouterr().err


def test_a_file_that_is_no_status_is_refused(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="expected an agent's status"):
        read_status(tmp_path / "status.json")


def test_a_running_agent_holds_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = StateFolder(tmp_path)
    (tmp_path / "status.json").write_text(status().model_dump_json())
    with folder.locked():
        assert show_status(folder, as_json=True) is ExitCode.RUNNING
    document = json.loads(capsys.readouterr().out)
    assert document["is_running"] is True
    assert document["broker"]["last_error"] == "connection refused"


def test_a_folder_whose_agent_is_gone_is_not_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = StateFolder(tmp_path)
    (tmp_path / "status.json").write_text(status().model_dump_json())
    with folder.locked():
        pass
    assert show_status(folder, as_json=False) is ExitCode.NOT_RUNNING
    assert "NOT RUNNING" in capsys.readouterr().out


def test_two_agents_cannot_share_a_folder(tmp_path: Path) -> None:
    with StateFolder(tmp_path).locked(), pytest.raises(Conflict, match="expected to be the only agent here, process"):
        StateFolder(tmp_path).locked().__enter__()


def test_a_watched_status_is_one_document_a_line_for_every_change_and_ctrl_c_ends_it_well(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text(status().model_dump_json())
    command = [sys.executable, "-m", "edge_agent", "status", "--state-dir", str(tmp_path), "--watch", "-o", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        write_atomically(path, status(expired=12, now=NOW + timedelta(seconds=1)).model_dump_json().encode())
        second = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (first["counters"], second["counters"]) == ({"expired": 0}, {"expired": 12})
    assert (process.returncode, errors) == (0, "")


async def test_what_cannot_be_read_at_once_is_read_before_each_look(tmp_path: Path) -> None:
    order: list[str] = []

    async def refresh() -> None:
        order.append("refresh")

    def look() -> AgentStatus:
        order.append("look")
        return status()

    with ThreadPoolExecutor(1) as disk:
        writer = StatusWriter(tmp_path / "status.json", look, disk=disk, clock=SystemClock(), refresh=refresh)
        running = asyncio.create_task(writer.run())
        while order != ["refresh", "look"]:
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait([running])
