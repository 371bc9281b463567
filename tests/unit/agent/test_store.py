"""ContentStore: what arrives is verified, what activates is whole, what is not needed goes."""

from pathlib import Path

import pytest

from core.digest import Digest, digest_of, hex_of
from core.errors import IntegrityError, InvalidManifest, NotFound
from edge_agent.sync.store import ContentStore
from edge_agent.sync.worklist import Worklist
from tests.support.variants import MadeVariant, made_variant


def put(store: ContentStore, content: bytes) -> Digest:
    digest = digest_of(content)
    store.put(digest, content)
    return digest


def put_variant(store: ContentStore, variant: MadeVariant) -> None:
    for content in variant.blobs.values():
        put(store, content)


def blob_path(root: Path, content: bytes) -> Path:
    return root / "blobs" / hex_of(digest_of(content))


def started(store: ContentStore, content: bytes) -> Path:
    """Begin to put a file together; return where it is."""
    file = made_variant({"model.onnx": content}).manifest.files[0]
    store.assembly(file, ()).allocate()
    return store.blob_path(digest_of(content)).parents[1] / "partial" / hex_of(digest_of(content))


def test_a_blob_is_stored_under_its_digest(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    digest = put(store, b"weights")
    assert store.has(digest)
    assert blob_path(tmp_path, b"weights").read_bytes() == b"weights"


def test_temporaries_of_a_crash_are_removed_at_start(tmp_path: Path) -> None:
    ContentStore(tmp_path)
    (tmp_path / "temporary" / "half").mkdir()
    (tmp_path / "temporary" / "half" / "model.onnx").write_bytes(b"half")
    ContentStore(tmp_path)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_variant_is_complete_when_manifest_and_every_file_are_here(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant({"model.onnx": b"graph", "weights/w.bin": b"weights"})
    contents = list(variant.blobs.values())
    for content in contents[:-1]:
        put(store, content)
        assert not store.is_complete(variant.digest)
    put(store, contents[-1])
    assert store.is_complete(variant.digest)


def test_stored_bytes_count_whole_files_and_chunks_of_unfinished_ones(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant({"model.onnx": b"graph", "w.bin": b"weights"}, chunk_bytes=3)
    put(store, b"graph")
    work = Worklist(variant.manifest, store)
    work.assemblies[digest_of(b"weights")].allocate()
    ref = work.missing()[0]
    assert store.stored_bytes(variant.manifest) == len(b"graph")
    work.put(ref, b"wei")
    work.close()
    assert store.stored_bytes(variant.manifest) == len(b"graph") + 3


def test_a_manifest_that_is_not_here_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="fetch it first"):
        ContentStore(tmp_path).manifest(made_variant().digest)


def test_a_manifest_that_rotted_is_removed_and_refused(tmp_path: Path) -> None:
    variant = made_variant()
    put_variant(ContentStore(tmp_path), variant)
    blob_path(tmp_path, variant.manifest.to_bytes()).write_bytes(b"{}")
    store = ContentStore(tmp_path)
    with pytest.raises(IntegrityError, match="removed"):
        store.manifest(variant.digest)
    assert not store.has(variant.digest)


def test_bytes_that_are_no_manifest_are_refused(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    with pytest.raises(InvalidManifest):
        store.manifest(put(store, b"graph"))


def test_a_materialised_variant_has_every_file_under_its_name(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant({"model.onnx": b"graph", "weights/w.bin": b"weights"})
    put_variant(store, variant)
    folder = store.materialise(variant.manifest, variant.digest)
    assert folder == tmp_path / "models" / hex_of(variant.digest)
    assert (folder / "model.onnx").read_bytes() == b"graph"
    assert (folder / "weights" / "w.bin").read_bytes() == b"weights"


def test_materialising_costs_no_second_copy(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant({"model.onnx": b"graph"})
    put_variant(store, variant)
    folder = store.materialise(variant.manifest, variant.digest)
    assert (folder / "model.onnx").samefile(blob_path(tmp_path, b"graph"))


def test_materialising_again_gives_the_same_folder(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant()
    put_variant(store, variant)
    before = store.materialise(variant.manifest, variant.digest).stat().st_ino
    assert store.materialise(variant.manifest, variant.digest).stat().st_ino == before


def test_a_file_that_rotted_never_runs(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant({"model.onnx": b"graph"})
    put_variant(store, variant)
    store.materialise(variant.manifest, variant.digest)
    blob_path(tmp_path, b"graph").write_bytes(b"gr4ph")
    with pytest.raises(IntegrityError, match="fetch it again"):
        store.materialise(variant.manifest, variant.digest)
    assert not store.is_complete(variant.digest)
    put(store, b"graph")
    folder = store.materialise(variant.manifest, variant.digest)
    assert (folder / "model.onnx").read_bytes() == b"graph"


def test_named_variants_are_kept_and_the_rest_goes(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variants = [made_variant(version=version) for version in (1, 2, 3)]
    for variant in variants:
        put_variant(store, variant)
        store.materialise(variant.manifest, variant.digest)
    store.remove_unneeded(keep=[variant.digest for variant in variants[1:]])
    assert [store.is_complete(variant.digest) for variant in variants] == [False, True, True]
    assert len(list((tmp_path / "models").iterdir())) == 2
    assert len(list((tmp_path / "blobs").iterdir())) == 4


def test_what_is_asked_for_is_kept_even_when_unfinished(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant({"model.onnx": b"graph", "w.bin": b"weights"})
    put(store, variant.manifest.to_bytes())
    wanted, stranger = started(store, b"weights"), started(store, b"stranger")
    store.remove_unneeded(keep=[variant.digest])
    assert wanted.exists()
    assert not stranger.exists()


def test_files_shared_with_a_kept_variant_stay(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    old = made_variant({"model.onnx": b"old graph", "w.bin": b"weights"}, version=1)
    new = made_variant({"model.onnx": b"new graph", "w.bin": b"weights"}, version=2)
    for variant in (old, new):
        put_variant(store, variant)
    store.remove_unneeded(keep=[new.digest])
    assert store.is_complete(new.digest)
    assert not store.has(digest_of(b"old graph"))


def test_a_manifest_is_put_whole_or_not_at_all(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    with pytest.raises(IntegrityError, match="fetch it again"):
        store.put(digest_of(b"manifest"), b"another")
    assert list((tmp_path / "blobs").iterdir()) == []


def test_variants_that_were_loaded_and_are_whole_are_listed_from_the_folders_alone(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    loaded, brought = made_variant(version=1), made_variant(version=2)
    for variant in (loaded, brought):
        put_variant(store, variant)
    store.materialise(loaded.manifest, loaded.digest)
    assert ContentStore(tmp_path).complete_variants() == (loaded.digest,)
    store.blob_path(Digest(loaded.manifest.files[0].digest)).unlink()
    assert ContentStore(tmp_path).complete_variants() == ()


def test_a_pinned_variant_stays_until_nobody_needs_it(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    variant = made_variant()
    put_variant(store, variant)
    with store.pinned([variant.digest]):
        with store.pinned([variant.digest]):
            pass
        store.remove_unneeded(keep=())
        assert store.is_complete(variant.digest)
    store.remove_unneeded(keep=())
    assert not store.is_complete(variant.digest)
