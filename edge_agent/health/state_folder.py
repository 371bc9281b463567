"""The agent's folder on disk: where each thing lies, and whether an agent is alive on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core import folder_lock


class StateFolder:
    def __init__(self, root: Path) -> None:
        self.identity = root / "identity"
        self.trust = root / "trust"
        # The anchor of everything in it, written at enrolment.
        self.root = self.trust / "root.json"
        self.store = root / "store"
        self.journal = root / "journal"
        self.samples = root / "samples"
        self.outbox = root / "outbox.sqlite"
        self.status = root / "status.json"
        self.footprints = root / "footprints.json"
        self.endpoints = root / "endpoints.json"
        self._lock = root / "agent.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it for this process.

        Raises:
            Conflict: another agent holds it.
        """
        with folder_lock.held(self._lock, what="agent"):
            yield

    def is_held(self) -> bool:
        """Say whether an agent is alive on this folder."""
        return folder_lock.is_held(self._lock)
