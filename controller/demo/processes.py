"""The parts of the demo as processes: started with a log file each, waited for, and gone afterwards.

Every part leads a process group of its own, so that Ctrl-C in the terminal reaches the demo alone and it can stop the
parts in order: last started, first stopped; a part that does not go in time is killed with all of its children.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from core.errors import Unavailable

# A controller stops its heavy tier first: Ray takes three to five seconds (measured).
STOP_TIMEOUT_S = 25.0
# After SIGKILL only the kernel is waited for.
KILL_TIMEOUT_S = 10.0
POLL_S = 0.05
LOG_TAIL_LINES = 15

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def require_running(self) -> None:
        """Raise Unavailable, with the end of the part's log, if it has ended."""
        if self.process.poll() is None:
            return
        raise self._ended()

    def finish(self, *, timeout_s: float) -> None:
        """Wait until a part that ends by itself has done so.

        Raises:
            Unavailable: it failed, or was not done within `timeout_s`.
        """
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{self.name}: expected its end within {timeout_s:g} s; see {self.log}") from None
        if self.process.returncode:
            raise self._ended()

    def _ended(self) -> Unavailable:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise Unavailable(
            f"{self.name} ended with exit code {self.process.returncode}; its log {self.log} ends:\n{tail}"
        )

    def wait_for(self, what: str, probe: Callable[[], T | None], *, timeout_s: float) -> T:
        """Return what `probe` gives once it gives something.

        Raises:
            Unavailable: the part ended, or `timeout_s` passed first.
        """
        give_up_s = time.monotonic() + timeout_s
        while time.monotonic() < give_up_s:
            found = probe()
            if found is not None:
                return found
            self.require_running()
            time.sleep(POLL_S)
        raise Unavailable(f"{self.name}: expected {what} within {timeout_s:g} s; see {self.log}")

    def stop(self) -> None:
        """Ask the part to end, then make it; nothing of its process group is left, also when this is interrupted."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # It did not end in time; what follows does not ask.
            pass
        finally:
            kill_group(self.process.pid)
            self.process.wait(KILL_TIMEOUT_S)


class Parts:
    """All parts of one demo; leaving the `with` block stops them."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def start(self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Part:
        self._log_folder.mkdir(parents=True, exist_ok=True)
        log = self._log_folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        part = Part(name, process, log)
        self._stack.callback(part.stop)
        return part

    def start_python(self, name: str, module: str, *arguments: str) -> Part:
        return self.start(name, [sys.executable, "-m", module, *arguments])


def kill_group(leader: int) -> None:
    """Kill whatever is left of the process group; its leader has been waited for."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
