"""Die at every step by which a sample replaces another: `python -m tests.support.sample_crash_points FOLDER`.

As `crash_points` does: each child puts a sample into a full store and ends before its n-th change of the disk, or with
half of what was written and not made durable. The parent then demands that every sample that is found is whole, and
that what was there before is there still, but for the one that made room.
"""

import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

from edge_agent.samples.store import SampleStore, StoreBounds, description_of
from tests.support.crash_points import COMPLETED, CRASHED, crash_at
from tests.support.hard_examples import TAKEN_AT, made_file

BOUNDS = StoreBounds(max_samples=3, reserve_bytes=0)


def put(folder: Path, number: int) -> None:
    store = SampleStore(folder, BOUNDS)
    store.look()
    at = TAKEN_AT + timedelta(seconds=number)
    store.put(*made_file(taken_at=at, mark=float(number)), now=at)


def require_whole(folder: Path) -> None:
    store = SampleStore(folder, BOUNDS)
    store.look()
    found = store.all()
    assert len(found) >= 2, f"expected what was there before, got {found}"
    for kept in found:
        description_of(store.read(kept), kept)
    assert store.damaged == 0
    assert len(list(folder.iterdir())) == len(found), "expected nothing of an interrupted write"


def main(folder: Path) -> int:
    template = folder / "template"
    for number in range(3):
        put(template, number)
    point = 0
    while True:
        root = folder / f"crash-{point}"
        shutil.copytree(template, root)
        child = os.fork()
        if child == 0:
            crash_at(point)
            put(root, 9)
            os._exit(COMPLETED)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        assert ended in (CRASHED, COMPLETED), f"crash point {point}: the child ended with {ended}"
        require_whole(root)
        if ended == COMPLETED:
            return point
        point += 1


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))}\n")
