"""The variants on probation: on record before they are loaded, watched while they serve, committed or rolled back.

    begin ─▶ (load and switch) ─▶ started ─▶ look, look, look … ─▶ committed, or in quarantine and `on_rollback`

Rolling back is the reconciler's work: a variant in quarantine is no aim of its planner, so the one before it is loaded
again, from the store. Nothing here asks anybody on the network.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from core.clock import Clock
from core.digest import Digest
from core.fleet_state import Problem, Slot, SlotPhase
from core.ids import ModelName, VariantName
from core.manifest import Manifest
from edge_agent.activation.probation import Commit, Evidence, KeepWatching, ProbationTerms, RollBack, judge
from edge_agent.activation.record import Quarantine, Trial, quarantine_problem
from edge_agent.reconcile.board import Board
from edge_agent.reconcile.ports import Watch
from edge_agent.reconcile.workplace import Workplace
from edge_agent.runtime.vitals import Vitals

# Chosen: a crash forgets at most a minute of a trial of ten, and the flash is written ten times.
SAVE_INTERVAL_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrialSettings:
    terms: ProbationTerms
    look_interval_s: float = 1.0


@dataclass(slots=True)
class _Watched:
    """One variant in this process; `before` is what earlier processes saw of it."""

    before: Trial
    watch: Watch
    max_latency_p95_s: float | None
    ran_s: float = 0.0
    stalls: int = 0

    def so_far(self) -> Trial:
        vitals = self.watch.vitals()
        return replace(
            self.before,
            ran_s=self.before.ran_s + self.ran_s,
            requests=self.before.requests + vitals.runs,
            failed_requests=self.before.failed_requests + vitals.failed_runs,
        )

    def evidence(self) -> Evidence:
        trial, vitals = self.so_far(), self.watch.vitals()
        seen = Vitals(trial.requests, trial.failed_requests, vitals.non_finite_runs, vitals.p95_s)
        return Evidence(trial.ran_s, seen, self.stalls, self.max_latency_p95_s)


class Trials:
    def __init__(
        self,
        place: Workplace,
        board: Board,
        settings: TrialSettings,
        *,
        software_version: str,
        clock: Clock,
        on_rollback: Callable[[], None],
    ) -> None:
        self._place = place
        self._board = board
        self._settings = settings
        self._software_version = software_version
        self._clock = clock
        self._on_rollback = on_rollback
        self._watched: dict[Digest, _Watched] = {}
        self._begun = asyncio.Event()

    async def begin(self, slot: Slot) -> Trial | None:
        """Put on record that `slot` is about to be loaded; return its trial, None when it needs none."""
        record = self._place.journal.record
        if record.is_committed(slot):
            return None
        known = record.trial_of(slot.manifest_digest)
        if known is None:
            known = Trial(slot, await self._proven(slot.model))
            await self._place.on_disk(self._place.journal.update, lambda found: found.on_trial(known))
        return known

    async def withdraw(self, trial: Trial) -> None:
        """Take back what `begin` put on record: it could not be loaded."""
        await self._place.on_disk(self._place.journal.update, lambda found: found.ended(trial.slot.manifest_digest))

    def started(self, trial: Trial, manifest: Manifest) -> None:
        """Watch the variant, which serves from now on."""
        terms = manifest.self_test
        allowed_ms = None if terms is None else terms.max_latency_p95_ms
        watch = self._place.host.watch(trial.slot.model)
        self._watched[trial.slot.manifest_digest] = _Watched(
            trial, watch, None if allowed_ms is None else allowed_ms / 1e3
        )
        self._begun.set()

    async def quarantine(self, slot: Slot, problem: Problem, *, fallback: Slot | None) -> None:
        """Never try `slot` again with this software; the record says why."""
        problem = quarantine_problem(slot, problem)
        entry = Quarantine(slot, problem, self._clock.now(), self._software_version, fallback)
        await self._place.on_disk(self._place.journal.update, lambda found: found.quarantining(entry))
        _log.error(
            "variant is in quarantine", extra={"model": slot.model, "version": slot.version, "why": problem.message}
        )

    async def run(self) -> None:
        """Look at what is on probation, for ever."""
        while True:
            await self._begun.wait()
            looked_s = self._clock.monotonic_s()
            await asyncio.sleep(self._settings.look_interval_s)
            await self._look(self._clock.monotonic_s() - looked_s)
            if not self._watched:
                self._begun.clear()

    async def _look(self, elapsed_s: float) -> None:
        for digest, watched in tuple(self._watched.items()):
            slot = watched.before.slot
            if self._place.host.running().get(slot.model) != digest:
                # A newer state took its place before it could prove itself.
                self._forget(digest)
                continue
            watched.ran_s += elapsed_s
            watched.stalls += elapsed_s > self._settings.look_interval_s + self._settings.terms.stall_s
            try:
                await self._rule(digest, watched)
            except OSError as error:
                # It stays on probation, and the next look tries to write again.
                _log.warning("the journal could not be written", extra={"reason": error.strerror or str(error)})

    async def _rule(self, digest: Digest, watched: _Watched) -> None:
        match judge(watched.evidence(), self._settings.terms):
            case Commit():
                await self._place.on_disk(self._place.journal.update, lambda found: found.ended(digest))
                self._forget(digest)
                self._board.advance(watched.before.slot, SlotPhase.READY)
                _log.info("model committed", extra={"model": watched.before.slot.model})
            case RollBack(problem):
                await self.quarantine(watched.before.slot, problem, fallback=watched.before.previous)
                self._forget(digest)
                self._on_rollback()
            case KeepWatching():
                await self._save(watched)

    async def _save(self, watched: _Watched) -> None:
        known = self._place.journal.record.trial_of(watched.before.slot.manifest_digest)
        trial = watched.so_far()
        if known is not None and trial.ran_s - known.ran_s >= SAVE_INTERVAL_S:
            await self._place.on_disk(self._place.journal.update, lambda found: found.on_trial(trial))

    def _forget(self, digest: Digest) -> None:
        self._watched.pop(digest).watch.stop()

    async def _proven(self, model: ModelName) -> Slot | None:
        """Return what runs now, or what that falls back on while it is on probation itself.

        The first variant of a model has nothing to fall back on; unproven, it is still better than none.
        """
        digest = self._place.host.running().get(model)
        if digest is None:
            return None
        trial = self._place.journal.record.trial_of(digest)
        if trial is not None:
            return trial.previous or trial.slot
        manifest = await self._place.on_disk(self._place.store.manifest, digest)
        return Slot(model, manifest.version, VariantName(manifest.variant), digest)
