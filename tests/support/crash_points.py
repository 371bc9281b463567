"""Die at every step that changes the disk, one process per step: `python -m tests.support.crash_points FOLDER update`.

Each child starts as the agent does, on a folder that runs version 1, and does one thing: `update` is pushed version 2,
fetches, tries, loads and commits it; `rollback` has version 2 on probation and sees it fail. It ends before its n-th
change of the file system (files opened for writing, writes at a place, renames, links, removals), or in the middle of
making one durable, with half of what was written, as a power cut would end it. The parent then starts on what is left,
without a controller, and demands either version, whole; then it is pushed version 2 again and must come to an end with
that. Prints the number of crash points.
"""

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from core.fleet_state import SlotPhase
from edge_agent.reconcile.executor import Reconciler
from tests.support.device import FAULTY, SOUND, Device, desired, phases, until
from tests.support.variants import made_variant

# Audit events (PEP 578) of calls that change the file system, raised before the change.
CHANGES = frozenset({"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"})
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OLD = made_variant({"model.onnx": b"old graph", "weights/w.bin": b"shared weights"}, version=1, chunk_bytes=8)
NEW = made_variant({"model.onnx": b"new graph", "weights/w.bin": b"shared weights"}, version=2, chunk_bytes=8)
CRASHED, COMPLETED = 9, 0


async def update(root: Path) -> None:
    device = Device(root, OLD, NEW)
    async with device.running() as reconciler:
        await reconciler.submit(desired(NEW, generation=2))
        device.see(SOUND)
        await until(reconciler, lambda: phases(reconciler) == {SlotPhase.READY})


async def rollback(root: Path) -> None:
    device = Device(root, OLD, NEW)
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        device.see(FAULTY)
        await device.host.until(lambda: device.runs(OLD))
        assert phases(reconciler) == {SlotPhase.FAILED}


async def begin(root: Path, scenario: str) -> None:
    device = Device(root, OLD, NEW)
    await device.apply(desired(OLD, generation=1))
    if scenario == "rollback":
        async with device.running() as reconciler:
            await reconciler.submit(desired(NEW, generation=2))


SCENARIOS = {"update": update, "rollback": rollback}


def crash_at(number: int) -> None:
    """Let this process die before its change number `number`."""
    seen = 0

    def changing(descriptor: int | None = None) -> None:
        nonlocal seen
        seen += 1
        if seen > number:
            if descriptor is not None:
                _lose_half(descriptor)
            os._exit(CRASHED)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            changing()

    sys.addaudithook(hook)
    _before("fsync", changing)
    _before("pwrite", lambda _: changing())


def _lose_half(descriptor: int) -> None:
    """Do what a power cut does to what was written and never made durable."""
    try:
        size_bytes = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, size_bytes // 2)
    except OSError:
        return  # A folder, or open for reading only.


def _before(name: str, call: Any) -> None:
    """Have `call` called before every os.`name`, in this process, which has no other purpose than to die."""
    original = getattr(os, name)

    def counted(descriptor: int, *arguments: Any) -> Any:
        call(descriptor)
        return original(descriptor, *arguments)

    setattr(os, name, counted)


async def require_whole(root: Path) -> None:
    """Raise AssertionError unless a start finds one of the versions, whole, and goes on from there."""
    device = Device(root)
    async with device.running() as reconciler:
        await reconciler.restored.wait()
        assert device.runs(OLD) or device.runs(NEW), "no version runs"
    device = Device(root, OLD, NEW)
    async with device.running() as reconciler:
        await _finish(device, reconciler)


async def _finish(device: Device, reconciler: Reconciler) -> None:
    was_rolled_back = bool(device.journal().record.quarantine)
    result = await reconciler.submit(desired(NEW, generation=9))
    assert (result.problem is not None) == was_rolled_back, result
    assert device.runs(OLD if was_rolled_back else NEW)


def main(folder: Path, scenario: str) -> int:
    template = folder / "template"
    asyncio.run(begin(template, scenario))
    number = 0
    while True:
        root = folder / f"crash-{number}"
        shutil.copytree(template, root)
        child = os.fork()
        if child == 0:
            crash_at(number)
            asyncio.run(SCENARIOS[scenario](root))
            os._exit(COMPLETED)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        assert ended in (CRASHED, COMPLETED), f"crash point {number}: the child ended with {ended}"
        try:
            asyncio.run(require_whole(root))
        except BaseException as error:
            error.add_note(f"after a crash at point {number} of {scenario}")
            raise
        shutil.rmtree(root)
        if ended == COMPLETED:
            return number
        number += 1


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]), sys.argv[2])}\n")
