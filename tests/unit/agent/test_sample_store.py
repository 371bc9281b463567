"""SampleStore: bounded, whole after a crash, unmoved by damage."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from core.errors import DiskFull, IntegrityError, NotFound, TooLarge
from core.samples import MAX_COUNT_ROWS, SampleCount
from edge_agent.samples.store import KeptSample, SampleStore, StoreBounds, description_of
from tests.support.hard_examples import TAKEN_AT, made_file

BOUNDS = StoreBounds(max_bytes=1 << 20, max_samples=5, max_age_s=3600.0, reserve_bytes=0)


def opened(folder: Path, bounds: StoreBounds = BOUNDS) -> SampleStore:
    store = SampleStore(folder, bounds)
    store.look()
    return store


def put(store: SampleStore, second: int = 0, **made: object) -> KeptSample:
    at = TAKEN_AT + timedelta(seconds=second)
    return store.put(*made_file(taken_at=at, mark=second / 10, **made), now=at)  # type: ignore[arg-type]


def test_what_was_put_is_there_after_a_restart_with_all_that_its_name_says(tmp_path: Path) -> None:
    kept = put(opened(tmp_path), label=None, reason="tied", privacy="site")
    [found] = opened(tmp_path).all()
    assert found == kept
    assert description_of(opened(tmp_path).read(found), found).taken_at == TAKEN_AT


def test_the_oldest_make_room_when_there_are_too_many(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = [put(store, second) for second in range(7)]
    assert list(store.all()) == kept[2:]
    assert store.shed == 2
    assert list(opened(tmp_path).all()) == kept[2:]


def test_the_oldest_make_room_when_their_bytes_are_too_many(tmp_path: Path) -> None:
    size_bytes = len(made_file(size=1000)[1])
    store = opened(tmp_path, BOUNDS._replace(max_bytes=2 * size_bytes + 200))
    kept = [put(store, second, size=1000) for second in range(3)]
    assert list(store.all()) == kept[1:]
    assert store.size_bytes == sum(each.size_bytes for each in kept[1:])


def test_what_is_too_old_goes_without_anything_new(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 0)
    late = put(store, 1800)
    store.tidy(now=TAKEN_AT + timedelta(seconds=3700))
    assert list(store.all()) == [late]


def test_a_clock_that_jumped_back_sheds_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = put(store, 1800)
    store.tidy(now=TAKEN_AT - timedelta(days=400))
    assert list(store.all()) == [kept]


def test_one_that_alone_is_too_large_is_refused_and_sheds_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path, BOUNDS._replace(max_bytes=2000))
    kept = put(store)
    with pytest.raises(TooLarge):
        put(store, 1, size=5000)
    assert list(store.all()) == [kept]


def test_a_disk_without_room_beyond_the_reserve_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path / "samples", BOUNDS._replace(reserve_bytes=1 << 60))
    with pytest.raises(DiskFull, match="reserved"):
        put(store)


@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda _: b"", lambda content: content + b"x"])
def test_a_damaged_sample_is_found_out_counted_and_removed(tmp_path: Path, damage: object) -> None:
    store = opened(tmp_path)
    kept, other = put(store), put(store, 1)
    path = tmp_path / kept.file_name
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    again = opened(tmp_path)
    with pytest.raises(IntegrityError):
        again.read(next(each for each in again.all() if each.digest == kept.digest))
    assert list(again.all()) == [other]
    assert again.damaged == 1
    assert not path.exists()


def test_files_that_are_none_of_ours_are_skipped_and_counted_once(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = put(store)
    for name in ("notes.txt", "1~digits~7~low_confidence~device~" + "0" * 64 + ".npz", "9" * 200 + ".npz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ("999999999999999~digits~1~tied~any~" + "0" * 64 + ".npz")).mkdir()
    store.look()
    store.look()
    assert list(store.all()) == [kept]
    assert store.damaged == 4


def test_what_somebody_removed_meanwhile_is_gone_and_no_error(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = put(store)
    (tmp_path / kept.file_name).unlink()
    with pytest.raises(NotFound):
        store.read(kept)
    assert not store.all()
    assert store.size_bytes == 0


def test_a_sample_under_the_name_of_another_class_is_found_out(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = put(store, privacy="site")
    path = tmp_path / kept.file_name
    path.rename(tmp_path / kept.file_name.replace("~site~", "~any~"))
    store.look()
    [renamed] = store.all()
    with pytest.raises(IntegrityError, match="its bytes do not"):
        description_of(store.read(renamed), renamed)


def test_counts_are_by_model_class_and_reason_and_bounded(tmp_path: Path) -> None:
    store = opened(tmp_path, BOUNDS._replace(max_samples=200))
    put(store, 0, label=1)
    put(store, 1, label=1)
    put(store, 2, label=None, reason="tied")
    assert store.counts().rows == (
        SampleCount("digits", 1, "low_confidence", 2),
        SampleCount("digits", None, "tied", 1),
    )
    for second in range(3, 3 + MAX_COUNT_ROWS):
        put(store, second, label=second)
    counts = store.counts()
    assert len(counts.rows) == MAX_COUNT_ROWS
    assert counts.other + sum(row.samples for row in counts.rows) == MAX_COUNT_ROWS + 3
    assert counts.size_bytes == store.size_bytes


def test_a_purge_takes_one_model_or_all(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 0)
    other = put(store, 1, model="faces")
    assert store.purge("digits") == 1
    assert list(store.all()) == [other]
    assert store.purge() == 1
    assert not list(tmp_path.iterdir())


def test_the_newest_of_a_model_come_first_and_none_from_before_since(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = [put(store, second) for second in range(3)]
    put(store, 3, model="faces")
    assert list(store.matching("digits")) == kept[::-1]
    assert list(store.matching("digits", since=TAKEN_AT + timedelta(seconds=1))) == kept[:0:-1]


def test_after_a_crash_at_any_instant_every_sample_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.sample_crash_points", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    # Making room, writing, making durable, renaming and the folder.
    assert int(done.stdout) >= 5
