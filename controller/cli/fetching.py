"""What a pull brought, from the controller's spool into a folder, as it comes.

long poll ─▶ what is here and not in the folder ─▶ fetch ─▶ … until every agent that is connected has ended
"""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from controller.api import sample_views as views
from controller.cli.client import LONG_POLL_S, ControllerClient
from controller.cli.screen import progress_console, warn
from core.digest import parse_digest
from core.errors import IntegrityError
from core.sample_folder import SampleFolder

# Chosen: each sample is a change, and a pull that goes on is looked at five times a second.
PACE_S = 0.2


@dataclass(slots=True)
class Fetched:
    pull: views.SamplePullView
    written: int = 0
    in_folder: int = 0
    size_bytes: int = 0
    damaged: int = 0


def fetch_samples(client: ControllerClient, pull_id: str, out: Path, *, wait_s: float) -> Fetched:
    """Fetch what is there, and what comes within `wait_s` from agents that are connected; then write the index.

    Raises:
        Refused: the pull is over.
    """
    folder = SampleFolder(out)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(*columns, TextColumn("{task.completed:.0f} of {task.total:.0f}"), console=progress_console()) as bar:
        try:
            fetched = _Fetching(client, pull_id, folder, bar).until(time.monotonic() + wait_s)
        finally:
            # Also of what came before Ctrl-C, or before the pull was over.
            in_folder = folder.write_index()
    fetched.in_folder = in_folder
    return fetched


class _Fetching:
    def __init__(self, client: ControllerClient, pull_id: str, folder: SampleFolder, bar: Progress) -> None:
        self._client = client
        self._pull_id = pull_id
        self._folder = folder
        self._bar = bar
        # Samples of the pull that are dealt with; they come in order.
        self._seen = 0

    def until(self, end_s: float) -> Fetched:
        found = self._client.sample_pull(self._pull_id)
        fetched = Fetched(found.pull)
        task = self._bar.add_task("samples", total=1)
        while True:
            self._fetch(found, fetched, task)
            left_s = end_s - time.monotonic()
            if found.samples:
                # There may be more of them.
                found = self._client.sample_pull(self._pull_id, start=self._seen)
            elif left_s <= 0 or not _is_awaited(found.pull):
                return fetched
            else:
                found = self._next(found.revision, left_s)

    def _next(self, revision: int, left_s: float) -> views.SamplePullDetailView:
        """Wait for something new, but look no more often than a person would."""
        time.sleep(min(PACE_S, left_s))
        wait_s = min(LONG_POLL_S, left_s)
        return self._client.sample_pull(self._pull_id, start=self._seen, after=revision, wait_s=wait_s)

    def _fetch(self, found: views.SamplePullDetailView, fetched: Fetched, task: TaskID) -> None:
        fetched.pull = found.pull
        total = max(1, sum(max(each.offered, each.samples) for each in found.pull.deliveries))
        for sample in found.samples:
            self._bar.update(task, total=total, completed=self._seen, description=sample.agent)
            self._fetch_one(sample, fetched)
            self._seen += 1
        self._bar.update(task, total=total, completed=self._seen)

    def _fetch_one(self, sample: views.PulledSampleView, fetched: Fetched) -> None:
        digest = parse_digest(sample.digest)
        fetched.size_bytes += sample.size_bytes
        if self._folder.has(sample.agent, digest):
            return
        content = self._client.sample(self._pull_id, sample.agent, sample.digest)
        try:
            self._folder.add(sample.agent, digest, content)
        except IntegrityError as error:
            fetched.damaged += 1
            warn(str(error))
        else:
            fetched.written += 1


def _is_awaited(pull: views.SamplePullView) -> bool:
    """Say whether an agent that is connected has not delivered yet."""
    return any(each.is_online and each.state in {"waiting", "delivering"} for each in pull.deliveries)
