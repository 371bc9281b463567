"""`nanofleet controller backup`, `restore` and `confirm-restore`."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from controller.backup.manifest import Progress as Told
from controller.cli.options import client_of
from controller.cli.screen import Output, OutputOption, bytes_text, progress_console, show

ConfigOption = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="TOML file; environment variables win over it.")
]


class BackupView(BaseModel):
    path: Path
    created_at: datetime
    files: int
    size_bytes: int


class RestoreView(BaseModel):
    data_dir: Path
    backup_at: datetime
    files: int
    size_bytes: int
    moved_aside: Path | None


def backup(
    target: Annotated[Path, typer.Argument(help="New folder for the backup.")],
    config: ConfigOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Copy the controller's state, also while it runs. The backup has keys: guard it as you guard data_dir."""
    from controller.backup.making import make_backup, size_bytes_of
    from controller.settings import load_settings

    settings, now = load_settings(config), datetime.now(UTC)
    software_version = version("nanofleet")
    total = size_bytes_of(settings) if (settings.data_dir / "controller.sqlite").exists() else 0
    with _bar("backing up", total) as told:
        made = make_backup(
            settings, target.absolute(), config=config, now=now, software_version=software_version, progress=told
        )
    view = BackupView(path=target, created_at=now, files=len(made.files), size_bytes=made.size_bytes)
    said = (
        f"backup of {settings.data_dir} is in {target}: {view.files} files, {bytes_text(view.size_bytes)}\n"
        "it holds the fleet's private keys in clear: encrypt it before it leaves this machine. Keys that are not in "
        "data_dir (signing keys kept elsewhere, http_key) are not in it"
    )
    show(view, said, output=output)


def restore(
    source: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of the backup.")],
    config: ConfigOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Move a state that is there aside.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a controller's state of a backup; the controller then only watches until `confirm-restore`."""
    from controller.backup.manifest import read_manifest
    from controller.backup.restoring import restore_backup
    from controller.settings import load_settings

    settings = load_settings(config)
    # Every byte is read twice: before and after it was copied.
    with _bar("restoring", 2 * read_manifest(source).size_bytes) as told:
        manifest, aside = restore_backup(
            settings, source.absolute(), replaces=replace, now=datetime.now(UTC), progress=told
        )
    view = RestoreView(
        data_dir=settings.data_dir,
        backup_at=manifest.created_at,
        files=len(manifest.files),
        size_bytes=manifest.size_bytes,
        moved_aside=aside,
    )
    show(view, _restored_text(view), output=output)


def confirm_restore(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """After a restore: let the controller tell agents again what they shall run."""
    with client_of(context) as client:
        view = client.confirm_restore()
    show(view, f"the restore is confirmed; positions are of epoch {view.epoch} now. {view.catalogue}", output=output)


def _restored_text(view: RestoreView) -> str:
    aside = "" if view.moved_aside is None else f"what was there is in {view.moved_aside}\n"
    return (
        f"{view.data_dir} is as it was at {view.backup_at.astimezone():%Y-%m-%d %H:%M:%S}\n{aside}"
        "bans, removed operators, used tokens, revocations and rotations since then are undone: do them again\n"
        "start the controller: it watches and pushes nothing until `nanofleet controller confirm-restore`; see before "
        "that what agents run, with `nanofleet controller drift`"
    )


@contextmanager
def _bar(what: str, total_bytes: int) -> Iterator[Told]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda done_bytes: progress.advance(task, done_bytes)
