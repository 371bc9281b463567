"""Pulls on disk: what was asked for, what came, and how each agent ended; whole after any death.

    samples/PULL/pull.json              what was asked for; a folder without it never began
                /AGENT/HEX.npz          a sample, named by its digest
                /AGENT/end.json         set when the agent has delivered or declined

Blocking, for one thread. What is damaged is skipped: the agent is asked again, as long as the pull lasts.
"""

import logging
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from controller.samples.model import Delivery, DeliveryState, Pull, PullView
from core.atomic_files import write_atomically
from core.digest import Digest, hex_of, parse_digest
from core.errors import InvalidRequest, NotFound
from core.ids import AgentId, ModelName, Name, checked_pull_id

_PULL, _END, _SUFFIX = "pull.json", "end.json", ".npz"
# What devices sent is for whoever runs the controller alone.
_MODE = 0o600

_log = logging.getLogger(__name__)


class _PullFile(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: Name
    limit: int
    since: datetime | None
    permits_metered: bool
    asked_by: str
    created_at: datetime
    expires_at: datetime
    agents: tuple[Name, ...]


class _EndFile(BaseModel):
    model_config = ConfigDict(extra="ignore")

    state: DeliveryState
    reason: str
    offered: int


class Spool:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> list[PullView]:
        """Return every pull that is here; what is none is removed."""
        found = []
        for folder in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            pull = _pull_in(folder)
            if pull is None:
                _log.warning("what is no pull was removed from the spool", extra={"entry": folder.name[:80]})
                _remove(folder)
            else:
                found.append(PullView(pull, {agent: _delivery_in(folder / agent) for agent in pull.agents}))
        return found

    def create(self, pull: Pull) -> None:
        content = _PullFile(
            model=pull.model,
            limit=pull.limit,
            since=pull.since,
            permits_metered=pull.permits_metered,
            asked_by=pull.asked_by,
            created_at=pull.created_at,
            expires_at=pull.expires_at,
            agents=pull.agents,
        )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self._folder / pull.pull_id / _PULL, content.model_dump_json().encode(), mode=_MODE)

    def keep(self, pull_id: str, agent_id: AgentId, digest: Digest, content: bytes) -> None:
        """Keep a sample.

        Raises:
            NotFound: the pull was dropped meanwhile.
            OSError: the disk does not take it.
        """
        self._require(pull_id)
        write_atomically(self._sample(pull_id, agent_id, digest), content, mode=_MODE)

    def end(self, pull_id: str, agent_id: AgentId, delivery: Delivery) -> None:
        """Remember how an agent ended. Raises as `keep`."""
        self._require(pull_id)
        content = _EndFile(state=delivery.state, reason=delivery.reason, offered=delivery.offered)
        write_atomically(self._folder / pull_id / agent_id / _END, content.model_dump_json().encode(), mode=_MODE)

    def read(self, pull_id: str, agent_id: AgentId, digest: Digest) -> bytes:
        """Return a sample as it came.

        Raises:
            NotFound: it is not here, or not any more.
        """
        try:
            return self._sample(pull_id, agent_id, digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"sample {digest}: is not here any more; pull again") from None

    def drop(self, pull_id: str) -> None:
        _remove(self._folder / pull_id)

    def _require(self, pull_id: str) -> None:
        """Raise NotFound unless the pull is there: what comes late must not make its folder again."""
        if not (self._folder / pull_id / _PULL).is_file():
            raise NotFound("pull: is over")

    def _sample(self, pull_id: str, agent_id: AgentId, digest: Digest) -> Path:
        return self._folder / pull_id / agent_id / f"{hex_of(digest)}{_SUFFIX}"


def _pull_in(folder: Path) -> Pull | None:
    """Return the pull of a folder; None: it holds none."""
    try:
        pull_id = checked_pull_id(folder.name)
        file = _PullFile.model_validate_json((folder / _PULL).read_bytes())
    except (InvalidRequest, ValidationError, OSError):
        return None
    return Pull(
        pull_id,
        ModelName(file.model),
        file.limit,
        file.since,
        file.permits_metered,
        file.asked_by,
        file.created_at,
        file.expires_at,
        tuple(AgentId(agent) for agent in file.agents),
    )


def _delivery_in(folder: Path) -> Delivery:
    samples = dict(_samples_in(folder))
    try:
        end = _EndFile.model_validate_json((folder / _END).read_bytes())
    except (ValidationError, OSError):
        state = DeliveryState.DELIVERING if samples else DeliveryState.WAITING
        return Delivery(state, samples=samples, size_bytes=sum(samples.values()))
    return Delivery(end.state, end.reason, end.offered, samples, sum(samples.values()))


def _samples_in(folder: Path) -> Iterator[tuple[Digest, int]]:
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            yield parse_digest(f"sha256:{path.stem}"), path.stat().st_size
        except (InvalidRequest, OSError):
            continue


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
