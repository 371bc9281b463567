"""The outbox on disks that really are full or read-only: file systems of a megabyte in memory. Needs root, to mount."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.outbox.ageing import Boot
from edge_agent.outbox.rows import Kind, NewRow
from edge_agent.outbox.storage import RETRY_S, Storage, Trouble
from tests.support.clocks import HeldClock
from tests.support.outbox_values import LIMITS


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()[:200]}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def opened(folder: Path, clock: HeldClock) -> Storage:
    storage = Storage(folder / "outbox.sqlite", LIMITS, clock=clock, boot=Boot("boot", clock.monotonic_s))
    storage.open()
    return storage


def put(storage: Storage, *names: str, size_bytes: int = 4) -> None:
    storage.add([NewRow(Kind.USAGE, name, os.urandom(size_bytes), storage.age.now_s(), 0) for name in names])


def names(storage: Storage) -> list[str]:
    return [row.dedupe_id for row in storage.oldest(Kind.USAGE, limit=1000, max_bytes=1 << 30)]


def fill_up(storage: Storage) -> None:
    for number in range(200):
        put(storage, f"{number}", size_bytes=10_000)
        if storage.figures().trouble is not None:
            return
    raise AssertionError("the disk took two megabytes")


def test_a_disk_without_a_free_byte_is_said_and_what_is_on_it_is_sent(disk: Path) -> None:
    storage = opened(disk, HeldClock())
    fill_up(storage)
    assert storage.figures().trouble is Trouble.FULL
    on_disk = names(storage)
    storage.remove([row.number for row in storage.oldest(Kind.USAGE, limit=3, max_bytes=1 << 30)])

    assert names(storage) == on_disk[3:]
    storage.close()


def test_a_disk_that_has_room_again_takes_what_was_in_memory(disk: Path) -> None:
    clock = HeldClock()
    (disk / "filler").write_bytes(bytes(600 << 10))
    storage = opened(disk, clock)
    fill_up(storage)
    (disk / "filler").unlink()
    clock.pass_s(RETRY_S)
    put(storage, "last")
    assert storage.figures().trouble is None
    found = names(storage)
    storage.close()

    after = opened(disk, clock)
    assert names(after) == found
    assert found[-1] == "last"
    after.close()


def test_what_is_on_a_disk_that_is_full_at_the_start_is_there(disk: Path) -> None:
    storage = opened(disk, HeldClock())
    put(storage, "a", "b")
    storage.close()
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(512))
        except OSError:
            pass
    storage = opened(disk, HeldClock())

    assert (names(storage), storage.figures().trouble) == (["a", "b"], Trouble.FULL)
    storage.close()


def test_a_disk_that_is_read_only_at_the_start_is_said_and_written_once_it_may_be(disk: Path) -> None:
    clock = HeldClock()
    storage = opened(disk, clock)
    put(storage, "a")
    storage.close()
    remount(disk, "ro")
    storage = opened(disk, clock)
    put(storage, "b")
    assert (names(storage), storage.figures().trouble) == (["b"], Trouble.READ_ONLY)
    remount(disk, "rw")
    clock.pass_s(RETRY_S)
    put(storage, "c")

    assert (names(storage), storage.figures().trouble) == (["a", "b", "c"], None)
    storage.close()
