"""How each step of the planner is taken: fetch, self-test, load, unload. One at a time, by the reconciler's task."""

import asyncio
import logging
from collections.abc import Collection, Coroutine
from functools import partial
from typing import Any, TypeVar, assert_never

from core.digest import Digest
from core.errors import InvalidManifest, Unavailable
from core.fleet_state import Slot, SlotPhase
from core.manifest import Manifest
from edge_agent.reconcile.board import Board
from edge_agent.reconcile.planner import FetchSlot, LoadSlot, SelfTestSlot, Step, UnloadModel
from edge_agent.reconcile.ports import Terms
from edge_agent.reconcile.trials import Trials
from edge_agent.reconcile.workplace import Workplace

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """What was under way was stopped, because something else is wanted now."""


class Steps:
    """`terms` is asked about every variant that is new to this machine; None: everything is allowed."""

    def __init__(self, place: Workplace, board: Board, trials: Trials, *, terms: Terms | None) -> None:
        self._place = place
        self._board = board
        self._trials = trials
        self._terms = terms
        self._under_way: tuple[Digest, asyncio.Task[Any]] | None = None
        self._is_interrupted = False
        # Passed their self-test since this process started.
        self.passed: set[Digest] = set()

    async def take(self, step: Step) -> None:
        """Take `step`.

        Raises:
            Interrupted: see `interrupt`.
            NanofleetError: it failed.
            OSError: the disk failed.
        """
        match step:
            case FetchSlot(slot):
                self._board.advance(slot, SlotPhase.FETCHING)
                await self._fetch(slot)
            case SelfTestSlot(slot):
                self._board.advance(slot, SlotPhase.SELF_TEST)
                await self._test(slot)
            case LoadSlot(slot):
                self._board.advance(slot, SlotPhase.LOADING)
                await self._load(slot)
            case UnloadModel(model):
                await self._place.host.unload(model)
                _log.info("model unloaded", extra={"model": model})
            case _:
                assert_never(step)

    def interrupt(self, *, unless: Collection[Digest] = ()) -> None:
        """Stop a fetch or a self-test under way, unless it is of one of these variants; a load is finished."""
        if self._under_way is not None and self._under_way[0] not in unless:
            self._is_interrupted = True
            self._under_way[1].cancel()

    async def _fetch(self, slot: Slot) -> None:
        digest, source = slot.manifest_digest, self._place.source
        manifest = await self._interruptible(slot, source.manifest(digest))
        self._require_allowed(slot, manifest)
        await self._interruptible(slot, source.variant(digest, partial(self._board.progress, slot)))

    async def _test(self, slot: Slot) -> None:
        manifest = await self._manifest(slot)
        self._require_allowed(slot, manifest)
        folder = await self._place.on_disk(self._place.store.materialise, manifest, slot.manifest_digest)
        result = await self._interruptible(slot, self._place.tester.test(manifest, folder))
        if result.problem is not None:
            # What runs now goes on, so there is nothing to fall back on.
            await self._trials.quarantine(slot, result.problem, fallback=None)
            return
        self.passed.add(slot.manifest_digest)
        _log.info(
            "self-test passed",
            extra={"model": slot.model, "version": slot.version, "latency_p95_ms": result.latency_p95_ms},
        )

    async def _load(self, slot: Slot) -> None:
        store = self._place.store
        manifest = await self._manifest(slot)
        self._require_allowed(slot, manifest)
        folder = await self._place.on_disk(store.materialise, manifest, slot.manifest_digest)
        self._board.advance(slot, SlotPhase.LOADING, stored_bytes=manifest.size_bytes, total_bytes=manifest.size_bytes)
        is_known = self._place.journal.record.trial_of(slot.manifest_digest) is not None
        trial = await self._trials.begin(slot)
        try:
            await self._place.host.load(manifest, slot.manifest_digest, folder)
        except Exception:
            if trial is not None and not is_known:
                await self._trials.withdraw(trial)
            raise
        if trial is not None:
            self._trials.started(trial, manifest)
        self._board.advance(slot, SlotPhase.READY if trial is None else SlotPhase.PROBATION)
        _log.info("model ready", extra={"model": slot.model, "version": slot.version, "variant": slot.variant})

    async def _manifest(self, slot: Slot) -> Manifest:
        manifest = await self._place.on_disk(self._place.store.manifest, slot.manifest_digest)
        _require_match(slot, manifest)
        return manifest

    def _require_allowed(self, slot: Slot, manifest: Manifest) -> None:
        """Ask the terms about what is new; what ran here before goes on whatever was withdrawn since."""
        _require_match(slot, manifest)
        if self._terms is not None and slot.manifest_digest not in self._place.journal.record.in_use():
            self._terms(manifest, slot)

    async def _interruptible(self, slot: Slot, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work, name=f"bring in {slot.model}")
        self._under_way, self._is_interrupted = (slot.manifest_digest, task), False
        try:
            # When this task is cancelled, awaiting cancels the work as well.
            return await task
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            if self._is_interrupted:
                raise Interrupted from None
            raise Unavailable(f"{slot.model}: the work on it was cancelled") from None
        finally:
            self._under_way = None


def _require_match(slot: Slot, manifest: Manifest) -> None:
    expected, got = (slot.model, slot.version, slot.variant), (manifest.model, manifest.version, manifest.variant)
    if got != expected:
        raise InvalidManifest(f"slot {slot.model}: expected the manifest of {expected}, got that of {got}")
