"""A file is the old or the new content, whole, and nothing is left beside it."""

from pathlib import Path

import pytest

from core.atomic_files import publish_file, write_atomically


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_content_and_mode_are_replaced_and_parents_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text is no bytes")  # type: ignore[arg-type]  # the fault that is provoked
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (target / "occupied").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_atomically(target, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_an_open_reader_keeps_the_whole_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old content")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old content"


def test_a_finished_file_is_moved_to_its_place(tmp_path: Path) -> None:
    temporary = tmp_path / "partial"
    temporary.write_bytes(b"blob")
    publish_file(temporary, tmp_path / "blobs" / "ab" / "abcd")
    assert (tmp_path / "blobs" / "ab" / "abcd").read_bytes() == b"blob"
    assert not temporary.exists()


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = open_descriptors()
    for number in range(8):
        write_atomically(tmp_path / "new" / str(number), b"x")
        publish_file(tmp_path / "new" / str(number), tmp_path / "moved")
    assert open_descriptors() == before
