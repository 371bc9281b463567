import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.heavy.store import ModelStore
from core import folder_lock
from core.digest import Digest, digest_of, hex_of
from core.errors import IntegrityError, InvalidManifest, TooLarge, UnknownModel
from tests.support.heavy_tier import MemoryBlobs, publish

ONNX = b"some bytes of a model"


class Artifacts:
    """The controller's blobs without a wire; `log` is what was fetched."""

    def __init__(self) -> None:
        self.blobs = MemoryBlobs()
        self.log: list[Digest] = []

    def fetch(self, digest: Digest) -> Iterator[bytes]:
        self.log.append(digest)
        if digest not in self.blobs.contents:
            raise UnknownModel(f"no model has the digest {digest}")
        content = self.blobs.contents[digest]
        yield content[:5]
        yield content[5:]


@pytest.fixture
def artifacts() -> Artifacts:
    return Artifacts()


def store_in(root: Path, artifacts: Artifacts, *, budget_bytes: int = 1 << 20) -> ModelStore:
    return ModelStore(root, artifacts, budget_bytes=budget_bytes)


def test_a_model_is_fetched_verified_and_kept(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, ONNX)
    manifest, folder = store_in(tmp_path, artifacts).obtain(digest)
    assert manifest.model == "scaling"
    assert (folder / "model.onnx").read_bytes() == ONNX


def test_a_model_that_is_here_is_not_fetched_again(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, ONNX)
    store_in(tmp_path, artifacts).obtain(digest)
    artifacts.log.clear()
    store_in(tmp_path, artifacts).obtain(digest)
    assert artifacts.log == []


def test_a_damaged_file_is_fetched_again(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, ONNX)
    _, folder = store_in(tmp_path, artifacts).obtain(digest)
    (folder / "model.onnx").write_bytes(b"rotten")
    _, folder = store_in(tmp_path, artifacts).obtain(digest)
    assert (folder / "model.onnx").read_bytes() == ONNX


def test_a_lost_file_is_fetched_again(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, ONNX)
    _, folder = store_in(tmp_path, artifacts).obtain(digest)
    (folder / "model.onnx").unlink()
    _, folder = store_in(tmp_path, artifacts).obtain(digest)
    assert (folder / "model.onnx").read_bytes() == ONNX


def test_other_bytes_than_the_digest_says_leave_nothing_behind(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, ONNX)
    artifacts.blobs.contents[digest_of(ONNX)] = ONNX[:-1] + b"!"
    with pytest.raises(IntegrityError, match="expected sha256"):
        store_in(tmp_path, artifacts).obtain(digest)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_more_bytes_than_the_manifest_says_are_not_taken(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, ONNX)
    artifacts.blobs.contents[digest_of(ONNX)] = ONNX + b"and more"
    with pytest.raises(IntegrityError, match=f"at most {len(ONNX)} bytes"):
        store_in(tmp_path, artifacts).obtain(digest)


def test_an_unknown_digest_is_an_unknown_model(tmp_path: Path, artifacts: Artifacts) -> None:
    with pytest.raises(UnknownModel):
        store_in(tmp_path, artifacts).obtain(digest_of(b"nothing"))


def test_a_blob_that_is_no_manifest_is_refused(tmp_path: Path, artifacts: Artifacts) -> None:
    with pytest.raises(InvalidManifest):
        store_in(tmp_path, artifacts).obtain(artifacts.blobs.add(b"{}"))


def test_a_model_over_the_budget_is_not_fetched(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, b"x" * 2000)
    with pytest.raises(TooLarge, match="at most 1000 bytes, got 2000"):
        store_in(tmp_path, artifacts, budget_bytes=1000).obtain(digest)
    assert artifacts.log == [digest]


def test_the_longest_unused_model_makes_room(tmp_path: Path, artifacts: Artifacts) -> None:
    digests = [publish(artifacts.blobs, bytes([index]) * 1000) for index in range(3)]
    store = store_in(tmp_path, artifacts, budget_bytes=4000)
    for age, digest in enumerate(digests[:2]):
        store.obtain(digest)
        os.utime(tmp_path / "models" / hex_of(digest), (age, age))
    store.obtain(digests[2])
    kept = {path.name for path in (tmp_path / "models").iterdir()}
    assert kept == {hex_of(digest) for digest in digests[1:]}


def test_a_replica_that_comes_second_uses_what_the_first_has_published(tmp_path: Path, artifacts: Artifacts) -> None:
    digest = publish(artifacts.blobs, ONNX)
    _, folder = store_in(tmp_path, Overtaken(tmp_path, artifacts)).obtain(digest)
    assert (folder / "model.onnx").read_bytes() == ONNX
    assert list((tmp_path / "incoming").iterdir()) == []


def left_behind(root: Path) -> tuple[Path, Path]:
    """Make what a fetch that began long ago has on the disk: its folder and its lock file."""
    folder, lock = root / "incoming" / "0123-ab", root / "incoming" / "0123-ab.lock"
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "model.onnx").write_bytes(b"half")
    lock.touch()
    for path in (folder, lock):
        os.utime(path, (0, 0))
    return folder, lock


def test_what_a_killed_replica_left_half_fetched_goes_with_the_next_fetch(tmp_path: Path, artifacts: Artifacts) -> None:
    left_behind(tmp_path)
    store_in(tmp_path, artifacts).obtain(publish(artifacts.blobs, ONNX))
    assert list((tmp_path / "incoming").iterdir()) == []


def test_a_half_fetched_folder_without_a_lock_goes_as_well(tmp_path: Path, artifacts: Artifacts) -> None:
    _, lock = left_behind(tmp_path)
    lock.unlink()
    store_in(tmp_path, artifacts).obtain(publish(artifacts.blobs, ONNX))
    assert list((tmp_path / "incoming").iterdir()) == []


def test_what_another_replica_is_fetching_stays(tmp_path: Path, artifacts: Artifacts) -> None:
    folder, lock = left_behind(tmp_path)
    with folder_lock.held(lock, what="fetch"):
        os.utime(lock, (0, 0))
        store_in(tmp_path, artifacts).obtain(publish(artifacts.blobs, ONNX))
        assert (folder / "files" / "model.onnx").read_bytes() == b"half"


class Overtaken(Artifacts):
    """Lets another replica publish the same model while this one is fetching."""

    def __init__(self, root: Path, artifacts: Artifacts) -> None:
        super().__init__()
        self.blobs = artifacts.blobs
        self._other = ModelStore(root, artifacts, budget_bytes=1 << 20)

    def fetch(self, digest: Digest) -> Iterator[bytes]:
        if digest == digest_of(ONNX):
            (manifest,) = (known for known in self.blobs.contents if known != digest)
            self._other.obtain(manifest)
        yield from super().fetch(digest)
