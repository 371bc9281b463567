"""A folder that one process at a time may use.

The lock is the kernel's and goes with the process, so it also tells whether the holder is alive: unlike a process id,
which another process may have by now.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import Conflict


@contextmanager
def held(lock: Path, *, what: str) -> Iterator[None]:
    """Hold the lock file `lock`, made with its folder when missing; `what` names the holder's kind, as in "agent".

    Raises:
        Conflict: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+", encoding="ascii") as file:
        if not _try_lock(file.fileno(), fcntl.LOCK_EX):
            file.seek(0)
            holder = file.read(20).strip() or "unknown"
            raise Conflict(f"{lock.parent}: expected to be the only {what} here, process {holder} is one already")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def is_held(lock: Path) -> bool:
    """Say whether a process holds the lock file now."""
    try:
        with lock.open("rb") as file:
            return not _try_lock(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
