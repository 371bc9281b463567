"""Bring a backup back as a controller's state, marked as what it is: older than what its agents know."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from controller.backup.making import DATABASE
from controller.backup.manifest import Manifest, Progress, read_manifest, verify
from controller.settings import Settings
from controller.storage.copies import highest_epoch, mark_restored
from core import folder_lock
from core.atomic_files import sync_folder
from core.errors import Conflict

LOCK = "controller.lock"


def restore_backup(
    settings: Settings, source: Path, *, replaces: bool, now: datetime, progress: Progress
) -> tuple[Manifest, Path | None]:
    """Make `settings.data_dir` of the backup in `source`; return its manifest, and where the state before went.

    Nothing of data_dir is touched before every byte of the backup was looked at. What was there is moved aside.

    Raises:
        InvalidRequest: `source` is no backup.
        IntegrityError: the backup is damaged.
        Conflict: a controller runs on data_dir, or there is something and `replaces` does not say that it may go.
    """
    manifest = read_manifest(source)
    data_dir = settings.data_dir
    with _locked(data_dir):
        is_taken = data_dir.exists() and any(path.name != LOCK for path in data_dir.iterdir())
        if is_taken and not replaces:
            raise Conflict(f"{data_dir}: expected an empty data_dir, there is state in it; --replace moves it aside")
        verify(source, manifest, progress)
        restoring = data_dir.with_name(f"{data_dir.name}.restoring")
        shutil.rmtree(restoring, ignore_errors=True)
        _copy(source, restoring, manifest, progress)
        # An epoch that the state before has given is not given again.
        above = highest_epoch(data_dir / DATABASE) if (data_dir / DATABASE).is_file() else None
        mark_restored(restoring / DATABASE, backup_at=manifest.created_at, now=now, above_epoch=above or 0)
        return manifest, _take_place(restoring, data_dir, is_taken=is_taken, now=now)


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    if not data_dir.exists():
        yield
        return
    with folder_lock.held(data_dir / LOCK, what="controller"):
        yield


def _copy(source: Path, target: Path, manifest: Manifest, progress: Progress) -> None:
    """Copy, never link: what a controller writes must not change the backup."""
    target.mkdir(mode=0o700, parents=True)
    for file in manifest.files:
        copy = target / file.path
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy2(source / file.path, copy)
    # Once more: what was read the second time may have been changed since the first.
    verify(target, manifest, progress)


def _take_place(restoring: Path, data_dir: Path, *, is_taken: bool, now: datetime) -> Path | None:
    aside = None
    if is_taken:
        aside = data_dir.with_name(f"{data_dir.name}.before-{now:%Y%m%dT%H%M%SZ}")
        data_dir.rename(aside)
    elif data_dir.exists():
        (data_dir / LOCK).unlink(missing_ok=True)
        data_dir.rmdir()
    restoring.rename(data_dir)
    sync_folder(data_dir.parent)
    return aside
