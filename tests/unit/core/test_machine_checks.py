"""Each check on the machine in a good and in a bad world, made of real files, sockets and processes."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core.addresses import Address
from core.doctor import Finding, Verdict
from core.machine_checks import (
    certificate_lasts,
    clock_is_set,
    clocks_agree,
    disk_has_room,
    files_are_private,
    folder_works,
    memory_suffices,
    onnx_runtime_works,
    open_files_suffice,
    port_answers,
    port_is_free,
)

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


def assert_bad(finding: Finding, verdict: Verdict, *words: str) -> None:
    assert finding.verdict is verdict, finding
    assert finding.expected
    assert finding.remedy
    for word in words:
        assert word in f"{finding.found} {finding.remedy}"


def assert_fine(finding: Finding) -> None:
    assert finding.verdict is Verdict.OK, finding


def test_a_clock_that_was_never_set_is_a_problem() -> None:
    assert_fine(clock_is_set(NOW))
    assert_bad(clock_is_set(datetime(1970, 1, 1, 0, 3, tzinfo=UTC)), Verdict.PROBLEM, "1970-01-01", "timedatectl")


def test_clocks_may_differ_by_seconds_and_not_by_minutes() -> None:
    assert_fine(clocks_agree(NOW, NOW + timedelta(seconds=2), whose="the controller"))
    assert_bad(clocks_agree(NOW, NOW + timedelta(seconds=30), whose="x"), Verdict.WARNING, "30 s behind x")
    assert_bad(clocks_agree(NOW, NOW - timedelta(hours=1), whose="x"), Verdict.PROBLEM, "3600 s ahead of x")


def test_a_folder_that_can_be_written_is_fine_and_left_as_it_was(tmp_path: Path) -> None:
    assert_fine(folder_works(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_on_a_read_only_file_system_is_a_problem() -> None:
    assert_bad(folder_works(Path("/proc/self")), Verdict.PROBLEM, "/proc/self")


def test_a_folder_that_is_not_there_is_not_looked_at(tmp_path: Path) -> None:
    assert folder_works(tmp_path / "later").verdict is Verdict.SKIPPED


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "tmpfs"])
def test_a_folder_on_a_file_system_that_does_not_keep_its_word_is_a_warning(tmp_path: Path, kind: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path} {kind} rw 0 0\n")
    assert_bad(folder_works(tmp_path, mounts=mounts), Verdict.WARNING, kind)


def test_a_disk_with_less_room_than_is_needed_is_a_problem(tmp_path: Path) -> None:
    assert_fine(disk_has_room(tmp_path / "not" / "yet", need_bytes=1, what_for="models"))
    assert_bad(disk_has_room(tmp_path, need_bytes=1 << 60, what_for="models"), Verdict.PROBLEM, "MiB free")


def test_a_key_that_others_can_read_is_a_problem(tmp_path: Path) -> None:
    keys = [tmp_path / "a.pem", tmp_path / "b.pem"]
    for key in keys:
        key.touch(mode=0o600)
    assert_fine(files_are_private(keys))
    keys[1].chmod(0o640)
    assert_bad(files_are_private(keys), Verdict.PROBLEM, "b.pem has mode 0640", f"chmod 600 {keys[1]}")


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """What the kernel says of a machine with 2,000 MiB to spare and no limit."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 4096000 kB\nMemAvailable: 2048000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/system.slice/agent.service\n")
    (tmp_path / "cgroup" / "system.slice" / "agent.service").mkdir(parents=True)
    return tmp_path


def test_memory_is_judged_by_what_the_kernel_says_is_available(kernel: Path) -> None:
    world = {"proc": kernel / "proc", "cgroups": kernel / "cgroup"}
    assert_fine(memory_suffices(1 << 30, **world))
    assert_bad(memory_suffices(4 << 30, **world), Verdict.WARNING, "2,000 MiB available")


def test_the_narrowest_limit_of_the_control_groups_counts(kernel: Path) -> None:
    for folder, limit in (("system.slice", "max"), ("system.slice/agent.service", str(150 << 20))):
        (kernel / "cgroup" / folder / "memory.max").write_text(f"{limit}\n")
        (kernel / "cgroup" / folder / "memory.current").write_text(f"{50 << 20}\n")
    found = memory_suffices(200 << 20, proc=kernel / "proc", cgroups=kernel / "cgroup")
    assert_bad(found, Verdict.WARNING, "100 MiB left by the control group", "MemoryMax")


def test_this_machine_has_some_memory() -> None:
    assert_fine(memory_suffices(1))


def test_few_open_files_are_a_warning() -> None:
    assert_fine(open_files_suffice(20_000, need=16_384))
    assert_fine(open_files_suffice(-1, need=16_384))
    assert_bad(open_files_suffice(1024, need=16_384), Verdict.WARNING, "1024", "LimitNOFILE")


@pytest.fixture
def listening() -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Address("127.0.0.1", server.getsockname()[1])


def test_a_port_that_is_taken_is_a_problem(listening: Address, unused_tcp_port: int) -> None:
    assert_fine(port_is_free("port", Address("127.0.0.1", unused_tcp_port), setting="grpc_bind"))
    assert_bad(port_is_free("port", listening, setting="grpc_bind"), Verdict.PROBLEM, "cannot listen", "grpc_bind")


def test_a_port_that_nobody_listens_on_is_a_problem(listening: Address, unused_tcp_port: int) -> None:
    assert_fine(port_answers("port", listening, remedy="start it"))
    absent = port_answers("port", Address("127.0.0.1", unused_tcp_port), remedy="start it")
    assert_bad(absent, Verdict.PROBLEM, "refused", "start it")


def lasting(begins: timedelta, ends: timedelta) -> Finding:
    return certificate_lasts(
        "certificate", NOW + begins, NOW + ends, now=NOW, spare=timedelta(days=2), remedy="renew it"
    )


def test_a_certificate_is_judged_by_its_dates() -> None:
    day = timedelta(days=1)
    assert_fine(lasting(-day, 5 * day))
    assert_bad(lasting(-6 * day, day), Verdict.WARNING, "good until", "renew it")
    assert_bad(lasting(-8 * day, -day), Verdict.PROBLEM, "expired", "renew it")
    assert_bad(lasting(day, 8 * day), Verdict.PROBLEM, "begins on", "set the clock")


def test_onnx_runtime_is_tried_in_a_child() -> None:
    assert_fine(onnx_runtime_works(os.environ))
    spying = onnx_runtime_works({**os.environ, "ORT_DISABLE_TELEMETRY": "0"})
    assert_bad(spying, Verdict.WARNING, "ORT_DISABLE_TELEMETRY")


def test_an_onnx_runtime_that_cannot_be_imported_is_a_problem(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    found = onnx_runtime_works(os.environ, python=str(tmp_path / "bare" / "bin" / "python"))
    assert_bad(found, Verdict.PROBLEM, "No module named 'onnxruntime'", "pip install onnxruntime")
