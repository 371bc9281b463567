"""A state folder that changes hands: what belongs to another agent or another fleet goes before the new identity comes.

    another identity ─▶ the old one is given up ─▶ journal emptied, foreign trust removed ─▶ root, then identity written

Whenever the power fails in between, the folder has no identity: the agent does not start, and the same `enrol` command
goes on where it stopped. What is to go is told by what lies there, not by the identity, which may be gone already.
Models stay in the store, but nothing says any more that they are to run.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from core.atomic_files import sync_folder
from core.clock import SystemClock
from core.errors import Untrusted
from edge_agent.activation.journal import Journal
from edge_agent.health.state_folder import StateFolder
from edge_agent.identity.folder import Identity, IdentityFolder


def making_room(folder: StateFolder) -> Callable[[Identity], None]:
    """Return what makes room in `folder` for an identity that is about to be written."""

    def make_room(identity: Identity) -> None:
        journal = Journal(folder.journal, clock=SystemClock())
        active = journal.record.current
        is_same_fleet = _root_sha256(folder.root) == identity.root_sha256
        if is_same_fleet and (active is None or active.agent_id == identity.agent_id):
            return
        IdentityFolder(folder.identity).give_up()
        journal.reset()
        if not is_same_fleet and folder.trust.exists():
            shutil.rmtree(folder.trust)
            sync_folder(folder.trust.parent)

    return make_room


def require_root_of(identity: Identity, root_file: Path) -> None:
    """Raise Untrusted when `root_file` is of another fleet than `identity`; without one nothing new is trusted."""
    found = _root_sha256(root_file)
    if found not in (None, identity.root_sha256):
        raise Untrusted(
            f"{root_file}: expected the root of this agent's enrolment, sha256 {identity.root_sha256[:16]}, "
            f"got {str(found)[:16]}; enrol again: nanofleet-agent enrol TOKEN --force"
        )


def _root_sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None
