"""Make a backup, also of a controller that runs meanwhile.

The database is copied as of one instant. Keys are copied before and after it: a key is stored before anything refers to
it, and may be deleted when nothing does any more, so what the copy refers to is in one of the two. Blobs come last:
they are never deleted.
"""

import os
import shutil
from datetime import datetime
from pathlib import Path

from controller.backup.manifest import MANIFEST, Manifest, Progress, made_manifest, sha256_of
from controller.settings import Settings
from controller.storage.copies import copy_database
from core.atomic_files import sync_folder, write_atomically
from core.errors import Conflict, IntegrityError, InvalidRequest

DATABASE, KEYS, BLOBS, CONFIGURATION = "controller.sqlite", "keys", "blobs", "controller.toml"


def size_bytes_of(settings: Settings) -> int:
    """Return about how many bytes there are to copy."""
    folders = (settings.keys_dir, settings.blobs_dir / "sha256")
    inside = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    return inside + (settings.data_dir / DATABASE).stat().st_size


def make_backup(
    settings: Settings, target: Path, *, config: Path | None, now: datetime, software_version: str, progress: Progress
) -> Manifest:
    """Copy the state in `settings.data_dir` to the new folder `target`; only whole does it get that name.

    Raises:
        InvalidRequest: there is no controller's state, or it is not in files.
        Conflict: `target` is there already.
        IntegrityError: a blob is not what its name says.
    """
    if not settings.database_url.startswith("sqlite:"):
        raise InvalidRequest(
            "backup: the records are in PostgreSQL, not in data_dir; save them with pg_dump, then keys and blobs"
        )
    if not (settings.data_dir / DATABASE).is_file():
        raise InvalidRequest(f"{settings.data_dir}: expected a controller's data_dir; name its settings with --config")
    if target.exists():
        raise Conflict(f"{target}: exists already; name a new folder for every backup")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # What is in it signs for the fleet.
    partial.mkdir(mode=0o700, parents=True)
    _copy_keys(settings.keys_dir, partial / KEYS)
    copy_database(settings.data_dir / DATABASE, partial / DATABASE)
    progress((partial / DATABASE).stat().st_size)
    _copy_keys(settings.keys_dir, partial / KEYS)
    _copy_blobs(settings.blobs_dir, partial / BLOBS, progress)
    if config is not None:
        shutil.copyfile(config, partial / CONFIGURATION)
    manifest = made_manifest(partial, now=now, software_version=software_version)
    _sync_tree(partial)
    write_atomically(partial / MANIFEST, manifest.model_dump_json(indent=1).encode(), mode=0o600)
    partial.rename(target)
    sync_folder(target.parent)
    return manifest


def _copy_keys(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, copy)
            except FileNotFoundError:
                # Deleted meanwhile, so nothing refers to it any more.
                continue
            copy.chmod(0o600)


def _copy_blobs(source: Path, target: Path, progress: Progress) -> None:
    for path in (source / "sha256").rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, copy)
            if sha256_of(copy) != path.name:
                raise IntegrityError(f"{path}: its bytes are not what its name says; publish that model anew")
            progress(copy.stat().st_size)


def _link_or_copy(path: Path, copy: Path) -> None:
    """Blobs never change, so a second name is as good as a copy on the same file system."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    sync_folder(folder)
