"""The queue of publications: a bounded number wait, one runs at a time, each leaves a record of how it ended.

    start ──▶ RUNNING "queued" ──▶ RUNNING stage by stage ──▶ recorded ──▶ released ──▶ DONE with a version
                                                     └──────▶ FAILED with a problem

A publication that a crash or a shutdown interrupts is found RUNNING at the next start and becomes FAILED: its steps are
not resumed, because the operator's client is gone and publishing again is safe. What one publication does is in
`pipeline`; here is only when it runs and what is remembered of it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from controller.registry.model import ModelVersion, Publication, PublicationState, PublishRequest, Variant
from controller.registry.store import RegistryStore
from core.clock import Clock
from core.errors import ErrorCode, InternalError, NanofleetError, Overloaded
from core.fleet_state import Problem
from core.ids import ModelName

_log = logging.getLogger(__name__)

_INTERRUPTED = Problem(ErrorCode.UNAVAILABLE, "interrupted by a restart; publish again")

# Chosen: more than fail before somebody notices a full disk; the older ones are of no interest then.
MAX_UNSTORED = 32


class Progress(Protocol):
    async def __call__(self, stage: str, done_ratio: float) -> None:
        """Note that `stage` begins, with `done_ratio` of the whole publication behind it."""
        ...


class Pipeline(Protocol):
    async def build(self, model: ModelName, request: PublishRequest, progress: Progress) -> ModelVersion:
        """Check, compress and measure; return the version, its blobs stored, ready to be recorded.

        Raises:
            NanofleetError: the model or the data sets are refused, with the reason.
        """
        ...


class Releases(Protocol):
    """What publishing asks of the signed catalogue: agents install nothing that is not in it."""

    async def release(self, variants: Sequence[Variant]) -> None:
        """Let agents install variants, at once or after they were signed elsewhere.

        Those that are released, staged or taken back already are left as they are.
        """
        ...


class _Job(NamedTuple):
    publication_id: str
    request: PublishRequest


class Publications:
    """Call `prepare` before the first `start`, and keep `run` running in a task of the owner."""

    def __init__(
        self,
        store: RegistryStore,
        pipeline: Pipeline,
        *,
        clock: Clock,
        new_id: Callable[[], str],
        max_queued: int,
        on_recorded: Callable[[ModelVersion], None],
        releases: Releases,
    ) -> None:
        self._store = store
        self._pipeline = pipeline
        self._clock = clock
        self._new_id = new_id
        self._on_recorded = on_recorded
        self._releases = releases
        self._max_queued = max_queued
        # Those that are not over yet: at most `max_queued` and the running one, which bounds the queue as well.
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(max_queued + 1)
        self._live: dict[str, Publication] = {}
        # Those that are over, but whose rows still say RUNNING because the store did not take the end; oldest first.
        self._unstored: dict[str, Publication] = {}
        self._changed = asyncio.Condition()

    async def prepare(self) -> None:
        """Mark what the last process left unfinished."""
        count = await self._store.fail_running_publications(_INTERRUPTED, now=self._clock.now())
        if count:
            _log.warning("publications were interrupted by the last stop", extra={"count": count})

    async def start(self, model: ModelName, request: PublishRequest) -> Publication:
        """Queue a publication and return it.

        Raises:
            Overloaded: as many as allowed are waiting.
        """
        if len(self._live) > self._max_queued:
            raise Overloaded(f"publish: {self._max_queued} publications are waiting; try again later")
        now = self._clock.now()
        publication = Publication(self._new_id(), model, PublicationState.RUNNING, "queued", 0.0, now, now)
        self._live[publication.id] = publication
        try:
            await self._store.add_publication(publication)
        except BaseException:
            del self._live[publication.id]
            raise
        self._queue.put_nowait(_Job(publication.id, request))
        return publication

    async def get(self, publication_id: str) -> Publication:
        return self._held(publication_id) or await self._store.publication(publication_id)

    async def next_change(self, seen: Publication, *, timeout_s: float) -> Publication:
        """Wait until the publication is no longer as `seen`, or for `timeout_s`; return how it is then."""
        try:
            async with asyncio.timeout(timeout_s):
                async with self._changed:
                    await self._changed.wait_for(lambda: self._held(seen.id) != seen)
                found = await self.get(seen.id)
                if found == seen:
                    # It is only in the store, where nothing changes it before the next start.
                    await asyncio.Event().wait()
                return found
        except TimeoutError:
            return seen

    async def run(self) -> None:
        """Work the queue off, for ever; cancelling it stops the running publication and its child process.

        It begins with the release of what was recorded and not released: a crash may have come between the two.
        """
        await self._release_recorded()
        while True:
            await self._run_one(await self._queue.get())

    async def _run_one(self, job: _Job) -> None:
        publication = self._live[job.publication_id]

        async def progress(stage: str, done_ratio: float) -> None:
            nonlocal publication
            publication = replace(publication, stage=stage, done_ratio=done_ratio, updated_at=self._clock.now())
            await self._store.update_publication(publication)
            await self._announce(publication)

        version: ModelVersion | None = None
        try:
            version = await self._pipeline.build(publication.model, job.request, progress)
            publication = await self._record(publication, version)
        except NanofleetError as error:
            publication = await self._fail(publication, error)
        except Exception:
            _log.exception("publication failed", extra={"publication": publication.id})
            defect = InternalError("publish: a defect of ours; the controller's log says more")
            publication = await self._fail(publication, defect)
        try:
            if version is not None and publication.state is PublicationState.DONE:
                await self._release(version.variants)
        finally:
            # Recorded is done: if the release failed, our supervisor starts `run` again, which begins with it.
            await self._announce(publication)

    async def _release_recorded(self) -> None:
        for model in await self._store.models():
            versions = await self._store.versions(model.name)
            await self._release([variant for version in versions for variant in version.variants])

    async def _release(self, variants: Sequence[Variant]) -> None:
        try:
            await self._releases.release(variants)
        except NanofleetError as error:
            if error.retryable:
                raise
            # The next one may still be released; deploying this one says what to do.
            _log.warning("version is recorded and cannot be released", extra={"reason": str(error)})

    async def _record(self, publication: Publication, version: ModelVersion) -> Publication:
        done = replace(
            publication,
            state=PublicationState.DONE,
            stage="done",
            done_ratio=1.0,
            version=version.version,
            updated_at=self._clock.now(),
        )
        await self._store.record_version(version, done)
        self._on_recorded(version)
        return done

    async def _fail(self, publication: Publication, error: NanofleetError) -> Publication:
        problem = Problem(error.code, str(error))
        failed = replace(publication, state=PublicationState.FAILED, problem=problem, updated_at=self._clock.now())
        try:
            await self._store.update_publication(failed)
        except Exception:  # whatever it is: a publication that is over must not stay live
            # The row stays RUNNING; the next start marks it FAILED.
            _log.warning("publication's end was not stored", extra={"publication": failed.id}, exc_info=True)
            self._hold_unstored(failed)
        return failed

    def _held(self, publication_id: str) -> Publication | None:
        return self._live.get(publication_id) or self._unstored.get(publication_id)

    def _hold_unstored(self, publication: Publication) -> None:
        if len(self._unstored) >= MAX_UNSTORED:
            del self._unstored[next(iter(self._unstored))]
        self._unstored[publication.id] = publication

    async def _announce(self, publication: Publication) -> None:
        async with self._changed:
            if publication.is_over:
                self._live.pop(publication.id, None)
            else:
                self._live[publication.id] = publication
            self._changed.notify_all()
