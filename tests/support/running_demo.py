"""`nanofleet demo` as a process of its own; every process that it starts, however deep, inherits a mark."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psutil

# Three minutes: a first start of Ray on two busy cores takes most of one.
DEMO_TIMEOUT_S = 300
MARK = "DEMO_TEST_MARK"


class Demo:
    """One run of the command, with the further `words` given."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.output, self.folder = folder / "demo.json", folder / "demo"
        self._log = folder / "demo.txt"
        self._mark = uuid4().hex
        command = [sys.executable, "-m", "controller.cli.app", "demo", "--output", str(self.output), *words]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, MARK: self._mark}
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind, also when the test failed."""
        for process in psutil.process_iter():
            if self._is_ours(process):
                process.kill()
        # Other tests look at the children of this process.
        self.process.wait(10)

    def finish(self) -> int:
        return self.process.wait(DEMO_TIMEOUT_S)

    def wait_for(self, text: str) -> None:
        give_up_s = time.monotonic() + DEMO_TIMEOUT_S
        while text not in self.printed:
            assert time.monotonic() < give_up_s, self.printed
            assert self.process.poll() is None, self.printed
            time.sleep(0.1)

    def left_behind(self) -> list[str]:
        return [process_name(process) for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output.read_text())
        return found


def process_name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:4])
    except psutil.Error:
        return str(process)
