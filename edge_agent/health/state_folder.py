"""The agent's folder on disk: where each thing lies, and the lock that keeps a second agent out.

The lock is the kernel's and goes with the process, so it also tells whether the agent is alive: unlike a process id,
which another process may have by now.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import Conflict


class StateFolder:
    def __init__(self, root: Path) -> None:
        self.store = root / "store"
        self.status = root / "status.json"
        self.endpoints = root / "endpoints.json"
        self._root = root
        self._lock = root / "agent.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it for this process.

        Raises:
            Conflict: another agent holds it.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a+", encoding="ascii") as file:
            if not _try_lock(file.fileno(), fcntl.LOCK_EX):
                file.seek(0)
                holder = file.read(20).strip() or "unknown"
                raise Conflict(f"{self._root}: expected to be the only agent, process {holder} uses this state_dir")
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def is_held(self) -> bool:
        """Say whether an agent is alive on this folder."""
        try:
            with self._lock.open("rb") as file:
                return not _try_lock(file.fileno(), fcntl.LOCK_SH)
        except FileNotFoundError:
            return False


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
