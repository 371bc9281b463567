"""One publish as the operator sees it: upload what the controller does not have, then watch the stages.

files ──digest──▶ HEAD each blob ──▶ PUT the missing ones ──▶ POST the version ──▶ long polls until done or failed
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from controller.api import operator_views as views
from controller.cli.client import ControllerClient, Refused
from controller.cli.screen import progress_console
from core.digest import Digest, digest_of_file
from core.ids import checked_name
from core.privacy import PrivacyClass

# The name under which the model's own file is published: nothing refers to it.
MODEL_PATH = "model.onnx"


def publish_model(
    client: ControllerClient,
    name: str,
    *,
    file: Path,
    extra_files: Sequence[Path],
    calibration: Path | None,
    evaluation: Path | None,
    recipes: tuple[str, ...],
    max_batch: int,
    cascade: views.CascadeBody | None,
    requires: tuple[str, ...],
    privacy: PrivacyClass | None,
) -> views.VersionView:
    """Publish and wait; return the new version.

    Raises:
        Refused: the controller refused a file or the request, or the publication failed; the message has the reason.
    """
    checked_name(name, kind="model")
    paths = [path for path in (file, *extra_files, calibration, evaluation) if path is not None]
    digests = {path: digest_of_file(path) for path in paths}
    upload(client, digests)
    body = views.PublishBody(
        file=views.FileBody(path=MODEL_PATH, digest=digests[file]),
        extra_files=tuple(views.FileBody(path=path.name, digest=digests[path]) for path in extra_files),
        calibration=None if calibration is None else digests[calibration],
        evaluation=None if evaluation is None else digests[evaluation],
        recipes=recipes,
        max_batch=max_batch,
        cascade=cascade,
        requires=requires,
        privacy=privacy,
    )
    publication = client.publish(name, body)
    # For `models publication`, when this terminal is gone.
    progress_console().print(f"publication {publication.id}", highlight=False)
    done = watch(client, publication)
    return next(version for version in client.model(name).versions if version.version == done.version)


def upload(client: ControllerClient, digests: dict[Path, Digest]) -> None:
    """Upload the files whose bytes the controller does not have."""
    columns = (TextColumn("upload {task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, console=progress_console()) as progress:
        for path, digest in digests.items():
            task = progress.add_task(path.name, total=path.stat().st_size)
            if client.has_blob(digest):
                progress.update(task, completed=path.stat().st_size, description=f"{path.name} (is there)")
                continue
            client.put_blob(digest, path, on_sent=partial(progress.advance, task))


def watch(client: ControllerClient, publication: views.PublicationView) -> views.PublicationView:
    """Show the stages until the publication is done.

    Raises:
        Refused: it failed.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=progress_console()) as progress:
        task = progress.add_task(publication.stage, total=1.0)
        while publication.state == "running":
            progress.update(task, description=publication.stage, completed=publication.done_ratio)
            publication = client.publication(publication.id, seen_at=publication.updated_at)
        progress.update(task, description=publication.stage, completed=publication.done_ratio)
    if publication.problem is not None:
        raise Refused(f"{publication.model}: {publication.stage}: {publication.problem.message}")
    return publication
