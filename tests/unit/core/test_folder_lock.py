import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import folder_lock
from core.errors import Conflict


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "agent.lock"
    with (
        folder_lock.held(lock, what="agent"),
        pytest.raises(Conflict, match=f"only agent here, process {os.getpid()} is one already"),
        folder_lock.held(lock, what="agent"),
    ):
        pass


def test_it_is_free_again_afterwards(tmp_path: Path) -> None:
    lock = tmp_path / "agent.lock"
    with folder_lock.held(lock, what="agent"):
        assert folder_lock.is_held(lock)
    assert not folder_lock.is_held(lock)
    with folder_lock.held(lock, what="agent"):
        assert folder_lock.is_held(lock)


def test_nobody_holds_a_lock_that_does_not_exist(tmp_path: Path) -> None:
    assert not folder_lock.is_held(tmp_path / "agent.lock")


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "agent.lock"
    code = (
        "import sys, pathlib; from core import folder_lock\n"
        "with folder_lock.held(pathlib.Path(sys.argv[1]), what='agent'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert folder_lock.is_held(lock)
        holder.kill()
        holder.wait()
    assert not folder_lock.is_held(lock)
