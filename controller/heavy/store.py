"""The models on a replica's disk: fetched from the controller, verified, published whole or not at all.

    <root>/models/<hex of the manifest digest>/manifest.json, files/…      complete and durable, by rename
    <root>/incoming/…                     in progress, each with a lock beside it; never read

Replicas of one node share the folder: whoever renames first wins, the other throws its copy away. What lies on the
disk is verified again each time it is loaded, so damage costs a new fetch, never a wrong answer. Everything here
blocks; it runs in the thread that loads models.
"""

import os
import secrets
import shutil
import time
from contextlib import closing
from pathlib import Path

from controller.heavy.artifacts import Artifacts
from core import folder_lock
from core.atomic_files import sync_folder
from core.digest import Digest, Hasher, digest_of_file, hex_of
from core.errors import IntegrityError, TooLarge
from core.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest

# Chosen: a lock file exists for an instant before it is held; nothing so young is looked at.
SWEEP_AFTER_S = 60.0


class ModelStore:
    def __init__(self, root: Path, artifacts: Artifacts, *, budget_bytes: int) -> None:
        self._models = root / "models"
        self._incoming = root / "incoming"
        self._artifacts = artifacts
        self._budget_bytes = budget_bytes

    def obtain(self, digest: Digest) -> tuple[Manifest, Path]:
        """Return the manifest of a model and the folder of its files, verified; fetch it when it is not here.

        Raises:
            UnknownModel: the controller has no such model.
            IntegrityError: what came is not what the digest says.
            InvalidManifest: the blob is no manifest.
            TooLarge: the model does not fit into the cache.
            Unavailable: the controller is away.
        """
        folder = self._models / hex_of(digest)
        manifest = _verified(folder, digest)
        if manifest is None:
            manifest = self._fetch(digest, folder)
        os.utime(folder)  # marks the use, for `_make_room`
        self._make_room(keep=folder)
        return manifest, folder / "files"

    def _fetch(self, digest: Digest, folder: Path) -> Manifest:
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._sweep()
        incoming = self._incoming / f"{hex_of(digest)[:12]}-{secrets.token_hex(8)}"
        lock = _lock_of(incoming)
        # The lock is there before the folder and goes after it, so a folder without a lock is nobody's.
        with folder_lock.held(lock, what="fetch"):
            try:
                incoming.mkdir()
                manifest = self._fetch_into(incoming, digest)
                _publish(incoming, folder)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
                lock.unlink()
        return manifest

    def _sweep(self) -> None:
        """Delete what replicas that were killed while fetching left behind."""
        young_s = time.time() - SWEEP_AFTER_S
        for entry in list(self._incoming.iterdir()):
            folder = entry.with_suffix("")
            if _last_used(entry) < young_s and not folder_lock.is_held(_lock_of(folder)):
                shutil.rmtree(folder, ignore_errors=True)
                _lock_of(folder).unlink(missing_ok=True)

    def _fetch_into(self, incoming: Path, digest: Digest) -> Manifest:
        self._fetch_blob(digest, incoming / "manifest.json", max_bytes=MAX_MANIFEST_BYTES)
        manifest = parse_manifest((incoming / "manifest.json").read_bytes())
        if manifest.size_bytes > self._budget_bytes:
            raise TooLarge(
                f"model {manifest.model!r}: expected at most {self._budget_bytes} bytes, got {manifest.size_bytes}; "
                "publish a smaller model"
            )
        for file in manifest.files:
            self._fetch_blob(Digest(file.digest), incoming / "files" / file.path, max_bytes=file.size_bytes)
        return manifest

    def _fetch_blob(self, digest: Digest, target: Path, *, max_bytes: int) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        hasher = Hasher()
        with target.open("xb") as out, closing(self._artifacts.fetch(digest)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if hasher.size_bytes + len(piece) > max_bytes:
                    raise IntegrityError(f"{digest}: expected at most {max_bytes} bytes, got more")
                hasher.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        hasher.require(digest)

    def _make_room(self, *, keep: Path) -> None:
        """Delete the longest unused models until the budget holds; an open session keeps its deleted files."""
        sizes = {folder: _size_bytes(folder) for folder in sorted(self._models.iterdir(), key=_last_used)}
        held_bytes = sum(sizes.values())
        for folder, size_bytes in sizes.items():
            if held_bytes <= self._budget_bytes:
                break
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)
                held_bytes -= size_bytes


def _lock_of(incoming: Path) -> Path:
    return incoming.with_suffix(".lock")


def _verified(folder: Path, digest: Digest) -> Manifest | None:
    """Return the manifest when the folder holds exactly what the digest says; otherwise make way for a new fetch."""
    if not folder.is_dir():
        return None
    try:
        content = (folder / "manifest.json").read_bytes()
        Hasher().update(content).require(digest)
        manifest = parse_manifest(content)
        intact = all(digest_of_file(folder / "files" / file.path) == file.digest for file in manifest.files)
    except (OSError, IntegrityError):
        intact = False
    if not intact:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return manifest


def _publish(incoming: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in (incoming, *(path for path in incoming.rglob("*") if path.is_dir())):
        sync_folder(path)
    try:
        incoming.rename(folder)
    except OSError:
        # Another replica of this node was first; its copy was verified like ours.
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another replica of this node made room at the same time
        return 0.0


def _size_bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except FileNotFoundError:
        return 0
