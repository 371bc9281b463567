"""`nanofleet … --watch` and tab completion, as processes against a controller on a real port."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.support.operator_side import RunningController, ScriptedAgent, running_controller

TIMEOUT_S = 30.0
COMMAND = (sys.executable, "-m", "controller.cli.app")


def environment(controller: RunningController) -> dict[str, str]:
    return {
        **os.environ,
        "NANOFLEET_CONTROLLER": controller.url,
        "NANOFLEET_CREDENTIAL": str(controller.credential_path),
        "COLUMNS": "160",
    }


@contextmanager
def watching(controller: RunningController, *words: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [*COMMAND, *words], env=environment(controller), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_document(stream: IO[str] | None) -> dict[str, object]:
    assert stream is not None
    document: dict[str, object] = json.loads(stream.readline())
    return document


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[RunningController]:
    with running_controller(tmp_path) as running:
        yield running


def test_watched_json_is_one_document_a_line_for_every_change_and_ctrl_c_ends_it_well(
    controller: RunningController,
) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    with watching(controller, "devices", "list", "--watch", "-o", "json") as process:
        assert next_document(process.stdout)["agents"] == []
        controller.call(agent.connect)
        while not (agents := next_document(process.stdout)["agents"]):
            pass
        assert isinstance(agents, list)
        assert [each["id"] for each in agents] == ["gate-1"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    controller.call(agent.disconnect)

    assert (process.returncode, errors) == (0, "")


def test_a_watch_survives_a_controller_that_is_started_again(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    with ExitStack() as stack:
        with running_controller(before) as first:
            port = int(first.url.rpartition(":")[2])
            process = stack.enter_context(watching(first, "status", "--watch", "-o", "json"))
            assert next_document(process.stdout)["version"] == "0.1.0"
        assert process.stderr is not None
        assert "trying again" in process.stderr.readline()
        with running_controller(after, port=port, version="0.2.0"):
            assert next_document(process.stdout)["version"] == "0.2.0"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0


def test_a_watch_that_finds_no_controller_at_first_ends_like_every_command(unused_tcp_port: int) -> None:
    done = subprocess.run(
        [*COMMAND, "--controller", f"http://127.0.0.1:{unused_tcp_port}", "status", "--watch"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 3
    assert "nanofleet controller run" in done.stderr


def test_on_a_terminal_the_table_is_drawn_in_its_own_place(controller: RunningController) -> None:
    agent, (leader, follower) = ScriptedAgent("gate-1", "berlin"), pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "devices", "list", "--watch"],
        env=environment(controller) | {"TERM": "xterm"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    try:
        shown = read_until(leader, b"version")
        controller.call(agent.connect)
        shown += read_until(leader, b"gate-1")
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT_S)
    finally:
        process.kill()
        os.close(leader)
    controller.call(agent.disconnect)

    # Up and cleared, line by line, instead of a second table below.
    assert b"\x1b[1A\x1b[2K" in shown
    assert process.returncode == 0


def read_until(descriptor: int, word: bytes) -> bytes:
    shown, until_s = b"", time.monotonic() + TIMEOUT_S
    while word not in shown:
        assert time.monotonic() < until_s, shown
        shown += os.read(descriptor, 1 << 16)
    return shown


def test_ctrl_c_in_the_middle_of_anything_else_is_130() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen([*COMMAND, "--controller", url, "status"], stderr=subprocess.PIPE, text=True)
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1 << 16)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "interrupted" in errors


# ---- completion -------------------------------------------------------------------------------------------------


def offered(line: str, env: dict[str, str]) -> tuple[list[str], str]:
    """Return what bash would offer at the end of `line`, and what was complained."""
    words = {"_NANOFLEET_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", "from controller.cli.app import app; app(prog_name='nanofleet')"],
        env={**env, **words},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.stdout.split(), done.stderr


def test_names_are_completed_from_the_running_controller(controller: RunningController) -> None:
    agents = [ScriptedAgent("gate-1", "berlin"), ScriptedAgent("yard-1", "munich")]
    for agent in agents:
        controller.call(agent.connect)
    env = environment(controller)
    found = [
        offered("nanofleet devices show ", env),
        offered("nanofleet devices ban ga", env),
        offered("nanofleet deploy nano --site ", env),
        offered("nanofleet operators remove ", env),
        offered("nanofleet models show ", env),
    ]
    for agent in agents:
        controller.call(agent.disconnect)

    expected = [["gate-1", "yard-1"], ["gate-1"], ["berlin", "munich"], ["test-admin"], []]
    assert found == [(names, "") for names in expected]


def test_completion_is_silent_and_quick_when_the_controller_is_away(
    controller: RunningController, unused_tcp_port: int
) -> None:
    env = environment(controller) | {"NANOFLEET_CONTROLLER": f"http://127.0.0.1:{unused_tcp_port}"}
    assert offered("nanofleet devices show ", env) == ([], "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_completion(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from controller.cli.app import app; app(prog_name='nanofleet')"],
        env={**os.environ, "_NANOFLEET_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0
    assert "_NANOFLEET_COMPLETE" in done.stdout
