"""The embedded heavy tier as the controller sees it: a child process, kept running.

Ray takes about ten seconds to start, so the controller does not wait for it: until the first probe succeeds, requests
for the heavy tier end in HeavyUnavailable, and edge agents keep their own answers. A child that ends is started again,
and so is one that lives and does not answer the probe: in its start, or later, when what it started has died. The
child ends when this process does, however that happens (see `controller.heavy.embedded`).
"""

import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from controller.heavy.arguments import ApplicationArguments, ClusterArguments
from controller.settings import HeavySettings
from core.addresses import Address
from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock

_log = logging.getLogger(__name__)

# What keeps the tier running; its one argument is ClusterArguments as JSON.
_CHILD = (sys.executable, "-m", "controller.heavy.embedded")
# Settings, which it is told as arguments, and secrets.
_OURS = "NANOFLEET_"


@dataclass(frozen=True, slots=True)
class ChildPolicy:
    """How patient the parent is with its child."""

    # Cold start is 10 s alone on 2 cores (measured); slow disks and busy machines get ten times that.
    start_timeout_s: float = 120.0
    # From one answered probe to the next. Chosen: Serve replaces a replica that hangs within 15 s, and requests that
    # fill the tier end at their deadline, by default within 30 s.
    silent_timeout_s: float = 60.0
    # The child ends by itself within 15 s of being asked, see _STOP_TIMEOUT_S of `controller.heavy.embedded`.
    stop_timeout_s: float = 20.0
    # A child that lived this long was well: the next restart is not delayed by what happened before. Chosen.
    proven_after_s: float = 60.0
    restart: BackoffPolicy = field(default_factory=lambda: BackoffPolicy(base_s=1.0, cap_s=30.0))


class Probe(Protocol):
    """Who asks the tier again and again whether it is there; the client."""

    async def wait_answer(self) -> None:
        """Return at the next answer; one from before the call, perhaps of an earlier child, does not count."""
        ...


class LocalHeavy:
    """Call `run` in a task of the owner; cancelling it stops the child and everything that the child started."""

    def __init__(
        self,
        settings: HeavySettings,
        *,
        data_dir: Path,
        controller: Address,
        tls_dir: Path,
        readiness: Probe,
        clock: Clock,
        policy: ChildPolicy | None = None,
        command: Sequence[str] = _CHILD,
    ) -> None:
        self._arguments = cluster_arguments(settings, data_dir=data_dir, controller=controller, tls_dir=tls_dir)
        self._log_file = data_dir / "heavy" / "heavy.log"
        self._probe = readiness
        self._clock = clock
        self._policy = policy or ChildPolicy()
        self._command = command

    @property
    def url(self) -> str:
        return f"http://{self._arguments.bind}"

    async def run(self) -> None:
        """Keep one child running, for ever."""
        backoff = Backoff(self._policy.restart)
        while True:
            started_s = self._clock.monotonic_s()
            status = await self._run_once()
            if self._clock.monotonic_s() - started_s >= self._policy.proven_after_s:
                backoff.reset()
            delay_s = backoff.next_delay_s()
            _log.warning(
                "heavy tier ended and will be started again",
                extra={"status": status, "delay_s": round(delay_s, 1), "log": str(self._log_file)},
            )
            await asyncio.sleep(delay_s)

    async def _run_once(self) -> int:
        child = await self._start()
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._require_answers(child), name="heavy-watch")
                status = await child.wait()
                watch.cancel()
            return status
        finally:
            await self._stop(child)

    async def _start(self) -> asyncio.subprocess.Process:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        if self._log_file.exists():
            # One run back is kept: the log that says why the last one ended.
            self._log_file.replace(self._log_file.with_suffix(".log.1"))
        with self._log_file.open("wb") as log:
            child = await asyncio.create_subprocess_exec(
                *self._command,
                self._arguments.model_dump_json(),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(),
                # A group of its own: Ctrl-C is for us, and what we kill at the end is all of it.
                start_new_session=True,
            )
        _log.info("heavy tier is starting", extra={"pid": child.pid, "url": self.url, "log": str(self._log_file)})
        return child

    async def _require_answers(self, child: asyncio.subprocess.Process) -> None:
        """Stop the child once it owes an answer for too long: the first since its start, or the next."""
        timeout_s, verdict = self._policy.start_timeout_s, "heavy tier did not become ready"
        try:
            while True:
                async with asyncio.timeout(timeout_s):
                    await self._probe.wait_answer()
                timeout_s, verdict = self._policy.silent_timeout_s, "heavy tier has stopped answering"
        except TimeoutError:
            _log.warning(verdict, extra={"pid": child.pid, "after_s": timeout_s})
            await self._stop(child)

    async def _stop(self, child: asyncio.subprocess.Process) -> None:
        """End the child: ask, wait for a bounded time, then kill it and its group; returns when it is gone."""
        if child.returncode is None:
            child.terminate()
            try:
                async with asyncio.timeout(self._policy.stop_timeout_s):
                    await child.wait()
            except TimeoutError:
                _log.warning("heavy tier did not end and is killed", extra={"pid": child.pid})
        _kill_group(child.pid)
        await child.wait()


def _environment() -> dict[str, str]:
    """Return our environment without what is ours in it: models of others run below the child, signing keys do not."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}


def _kill_group(group_id: int) -> None:
    try:
        os.killpg(group_id, signal.SIGKILL)
    except ProcessLookupError:
        return


def cluster_arguments(
    settings: HeavySettings, *, data_dir: Path, controller: Address, tls_dir: Path
) -> ClusterArguments:
    """Return what the child is told."""
    state_dir = (data_dir / "heavy").absolute()
    return ClusterArguments(
        state_dir=state_dir,
        bind=f"127.0.0.1:{settings.port}",
        # Stated, so that every replica fits whatever the machine has.
        cpus=math.ceil(settings.max_replicas * settings.cpus_per_replica),
        application=ApplicationArguments(
            controller=str(controller),
            tls_dir=tls_dir.absolute(),
            cache_dir=state_dir / "models",
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            cpus_per_replica=settings.cpus_per_replica,
            concurrent_runs=math.ceil(settings.cpus_per_replica),
            max_models=settings.max_models_per_replica,
            max_batch=settings.max_batch,
            batch_wait_ms=settings.batch_wait_s * 1000,
        ),
    )
