"""Chunks land where they belong, whatever their place and whatever the file system can do."""

import errno
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.sync.chunk_writer import ChunkWriter

ROOM_BYTES = 64 << 10
CONTENT = random.Random(1).randbytes(ROOM_BYTES)


class Disk:
    """A file system that may know no direct writes, or refuse them when they come; notes the offsets of those made."""

    def __init__(self, *, opens: bool = True, writes: bool = True) -> None:
        self._opens = opens
        self._writes = writes
        self._direct: set[int] = set()
        self.direct_writes: list[int] = []

    def open(self, path: Path, flags: int) -> int:
        is_direct = bool(flags & os.O_DIRECT)
        if is_direct and not self._opens:
            raise OSError(errno.EINVAL, "Invalid argument")
        # Whether this machine's own file system can do it does not matter here.
        descriptor = os.open(path, flags & ~os.O_DIRECT)
        if is_direct:
            self._direct.add(descriptor)
        return descriptor

    def pwrite(self, descriptor: int, content: memoryview, offset: int) -> int:
        if descriptor in self._direct:
            assert offset % 512 == len(content) % 512 == 0
            if not self._writes:
                raise OSError(errno.EINVAL, "Invalid argument")
            self.direct_writes.append(offset)
        return os.pwrite(descriptor, content, offset)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(4 * ROOM_BYTES))
    return path


@pytest.fixture
def writer() -> Iterator[ChunkWriter]:
    with closing(ChunkWriter(room_bytes=ROOM_BYTES)) as writer:
        yield writer


def nobody() -> None:
    """Hear that a chunk is safe."""


@given(offset=st.integers(0, 3 * ROOM_BYTES), size_bytes=st.integers(0, ROOM_BYTES))
def test_a_chunk_lands_where_it_belongs_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory, offset: int, size_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("writer") / "model.onnx"
    path.write_bytes(bytes(4 * ROOM_BYTES))
    with closing(ChunkWriter(room_bytes=ROOM_BYTES)) as writer:
        writer.write(path, CONTENT[:size_bytes], offset, nobody)
    expected = bytearray(4 * ROOM_BYTES)
    expected[offset : offset + size_bytes] = CONTENT[:size_bytes]
    assert path.read_bytes() == expected


@pytest.mark.parametrize("disk", [Disk(), Disk(opens=False), Disk(writes=False)], ids=["direct", "unknown", "refused"])
def test_a_file_system_without_direct_writes_gets_ordinary_ones(path: Path, disk: Disk) -> None:
    is_told: list[bytes] = []
    with closing(ChunkWriter(room_bytes=ROOM_BYTES, disk=disk)) as writer:
        for offset in (100, 100 + ROOM_BYTES):
            writer.write(path, CONTENT, offset, lambda: is_told.append(path.read_bytes()))
    assert path.read_bytes()[100 : 100 + 2 * ROOM_BYTES] == 2 * CONTENT
    assert is_told


def test_whole_blocks_go_directly_and_are_safe_before_they_are_written(path: Path) -> None:
    disk = Disk()
    seen: list[int] = []
    with closing(ChunkWriter(room_bytes=ROOM_BYTES, disk=disk)) as writer:
        writer.write(path, CONTENT, 4000, lambda: seen.append(len(disk.direct_writes)))
    assert disk.direct_writes == [4096]
    assert seen == [0]


def test_an_ordinary_write_is_safe_when_it_has_ended(path: Path) -> None:
    seen: list[bytes] = []
    with closing(ChunkWriter(room_bytes=ROOM_BYTES, disk=Disk(opens=False))) as writer:
        writer.write(path, CONTENT, 0, lambda: seen.append(path.read_bytes()[:ROOM_BYTES]))
    assert seen == [CONTENT]


def test_a_full_disk_is_told(path: Path) -> None:
    class FullDisk(Disk):
        def pwrite(self, descriptor: int, content: memoryview, offset: int) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with closing(ChunkWriter(room_bytes=ROOM_BYTES, disk=FullDisk())) as writer, pytest.raises(OSError, match="space"):
        writer.write(path, CONTENT, 0, nobody)


def test_one_file_is_open_at_a_time_and_none_in_the_end(path: Path, writer: ChunkWriter, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(mmap.PAGESIZE))
    before = len(list(Path("/proc/self/fd").iterdir()))
    writer.write(path, CONTENT, 0, nobody)
    open_for_one = len(list(Path("/proc/self/fd").iterdir()))
    writer.write(other, CONTENT[: mmap.PAGESIZE], 0, nobody)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_for_one
    writer.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
