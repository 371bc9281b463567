"""Die before every step that changes the disk, one process per step: `python -m tests.support.crash_points FOLDER`.

Each child starts on a store that runs version 1, brings in version 2, and ends at its n-th change of the file system,
as a power cut would end it. The parent then starts on what is left and demands either version, whole. Prints the
number of crash points.
"""

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from core.fleet_state import DesiredState, Position
from core.ids import AgentId
from edge_agent.activation.journal import Journal
from edge_agent.sync.store import ContentStore
from tests.support.clocks import HeldClock
from tests.support.variants import MadeVariant, made_variant

# Audit events (PEP 578) of calls that change the file system, raised before the change.
CHANGES = frozenset({"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"})
OLD = made_variant({"model.onnx": b"old graph", "weights/w.bin": b"shared weights"}, version=1)
NEW = made_variant({"model.onnx": b"new graph", "weights/w.bin": b"shared weights"}, version=2)
CRASHED, COMPLETED = 9, 0


def activate(root: Path, variant: MadeVariant, *, generation: int) -> None:
    """Do all that the agent does with the store for one desired state."""
    store = ContentStore(root)
    for digest, content in variant.blobs.items():
        if not store.has(digest):
            store.discard_partial(digest)
            store.append(digest, content, offset=0)
            store.finish(digest)
    store.materialise(variant.manifest, variant.digest)
    state = DesiredState(AgentId("a"), Position(1, generation), datetime(2026, 1, 2, tzinfo=UTC), (variant.slot,))
    journal = Journal(root / "journal", clock=HeldClock())
    journal.save_active(state)
    store.remove_unneeded(keep=journal.record.pins())


def crash_at(number: int) -> None:
    """Let this process die before its change number `number`."""
    seen = 0

    def hook(event: str, _arguments: object) -> None:
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen > number:
                os._exit(CRASHED)

    sys.addaudithook(hook)


def require_whole(root: Path) -> None:
    """Raise AssertionError unless what is active here is one of the versions, with all of its bytes."""
    store = ContentStore(root)
    active = Journal(root / "journal", clock=HeldClock()).record.current
    assert active is not None, "no version is active"
    (slot,) = active.slots
    variant = {found.digest: found for found in (OLD, NEW)}[slot.manifest_digest]
    folder = store.materialise(store.manifest(variant.digest), variant.digest)
    for file in variant.manifest.files:
        assert (folder / file.path).read_bytes() == variant.blobs[file.digest]  # type: ignore[index]  # digest as text
    activate(root, NEW, generation=3)


def main(folder: Path) -> int:
    template = folder / "template"
    activate(template, OLD, generation=1)
    number = 0
    while True:
        root = folder / f"crash-{number}"
        shutil.copytree(template, root, copy_function=os.link)
        child = os.fork()
        if child == 0:
            crash_at(number)
            activate(root, NEW, generation=2)
            os._exit(COMPLETED)
        _, status = os.waitpid(child, 0)
        require_whole(root)
        if os.waitstatus_to_exitcode(status) == COMPLETED:
            return number
        number += 1


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
