"""Bring this machine to its desired state, one step at a time, and say how it went.

One task (`run`) has the steps taken (`steps`), another watches what is on probation (`trials`). After every step the
plan is made anew from what is, so a restart, a repair, a rollback and an ordinary update are the same code. Invariants:

- A model serves until its successor is loaded; a slot that fails keeps what ran before and never holds up the others.
- A variant that is new here is tried in a process of its own, then on record before it is loaded, then on probation.
- The state in force is on disk before it is called applied. Applied means switched to: probation goes on after it.
- What failed its self-test or its probation is in quarantine: reported with the reason, and never tried again by this
  software unless somebody says so. What ran before it runs again, without asking anybody.
- A failure that may pass is tried again for ever; the answer to a push waits for the first few attempts only, and the
  report tells the problem until it has passed.
- A newer desired state takes over at once: a fetch or self-test that it does not want is dropped (what arrived stays
  for resuming), a load under way is finished, since half a switch is worse than a short wait.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from random import random

from core.clock import Clock
from core.digest import Digest
from core.errors import (
    ErrorCode,
    InternalError,
    NanofleetError,
    PermissionRequired,
    Unavailable,
)
from core.fleet_state import NOWHERE, DesiredState, Position, Problem, PushResult, Slot, SlotPhase, SlotReport
from core.ids import AgentId, ModelName
from edge_agent.activation.record import Record
from edge_agent.reconcile.admission import require_admissible
from edge_agent.reconcile.attempts import Attempts, RetryPolicy
from edge_agent.reconcile.board import Board
from edge_agent.reconcile.planner import Current, FetchSlot, LoadSlot, Step, plan
from edge_agent.reconcile.ports import Terms
from edge_agent.reconcile.steps import Interrupted, Steps
from edge_agent.reconcile.trials import Trials, TrialSettings
from edge_agent.reconcile.workplace import Workplace

_log = logging.getLogger(__name__)


class Reconciler:
    def __init__(
        self,
        agent_id: AgentId,
        place: Workplace,
        *,
        policy: RetryPolicy,
        trials: TrialSettings,
        software_version: str,
        clock: Clock,
        terms: Terms | None = None,
        uniform: Callable[[], float] = random,
    ) -> None:
        self._agent_id = agent_id
        self._place = place
        self._clock = clock
        self._attempts = Attempts(policy, uniform=uniform)
        self._active = place.journal.record.current
        self._target = self._active
        # Failures so far belong to an earlier round and say nothing about the next one.
        self._is_new_round = False
        self._answer: asyncio.Future[PushResult] | None = None
        self._work = asyncio.Event()
        # Set once every variant that was whole on disk at start is loaded, or has failed to.
        self.restored = asyncio.Event()
        self.board = Board(self.applied)
        self._trials = Trials(
            place,
            self.board,
            trials,
            software_version=software_version,
            clock=clock,
            on_rollback=self._replan,
        )
        self._steps = Steps(place, self.board, self._trials, terms=terms)

    @property
    def applied(self) -> Position:
        """The position of the desired state that was last applied as a whole."""
        return NOWHERE if self._active is None else self._active.position

    def submit(self, desired: DesiredState) -> "asyncio.Future[PushResult]":
        """Take `desired` as the new target; the future is shared by all who submit the same, so never cancel it.

        Raises:
            Forbidden: it is another agent's.
            Conflict: it is not newer than what is applied or worked on.
        """
        require_admissible(desired, agent_id=self._agent_id, applied=self.applied, target=self._target)
        if desired == self._target and self._answer is not None and not self._answer.done():
            return self._answer
        self._overtake(desired)
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    def retry_failed(self) -> None:
        """Give slots that failed another round of attempts, for example because the controller is back."""
        if self._attempts.given_up or self._attempts.persistent(self._clock.monotonic_s()):
            self._start_round()

    async def run(self) -> None:
        """Work for ever; when it fails and is run again, it goes on with the same target."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._trials.run(), name="probation")
            await self._work_for_ever()

    async def _work_for_ever(self) -> None:
        if self._active is None:
            self.restored.set()
        elif not self.restored.is_set():
            await self._reconcile(self._active)
        self._work.set()
        while True:
            await self._work.wait()
            self._work.clear()
            if self._is_new_round:
                self._is_new_round = False
                self._attempts.clear()
            if self._target is not None:
                await self._reconcile(self._target)

    def _start_round(self) -> None:
        self._is_new_round = True
        self._work.set()

    def _overtake(self, desired: DesiredState) -> None:
        if self._answer is not None and not self._answer.done():
            overtaken = Problem(ErrorCode.CONFLICT, f"overtaken by generation {desired.position.generation}")
            assert self._target is not None
            self._answer.set_result(PushResult(self._target.position, overtaken))
        self._target = desired
        self._start_round()
        self._steps.interrupt(unless={slot.manifest_digest for slot in desired.slots})

    def _replan(self) -> None:
        """Let what was just put into quarantine be replaced before anything else goes on."""
        self._start_round()
        self._steps.interrupt()

    @property
    def _record(self) -> Record:
        return self._place.journal.record

    async def _reconcile(self, target: DesiredState) -> None:
        """Take steps until nothing is left to do or to wait for; leave when there is a new target or new hope.

        What fails on and on is answered for, and tried on.
        """
        await self._collect(target)
        self.board.show([await self._first_report(slot) for slot in target.slots])
        while True:
            current = await self._current(target)
            self._show_quarantine(target)
            now_s = self._clock.monotonic_s()
            steps = plan(target.slots, current, on_hold=self._attempts.on_hold(now_s))
            if not (steps and isinstance(steps[0], LoadSlot)):
                self.restored.set()
            # Only from here to the next await is it certain that `target` is still the one that is wanted. What was
            # active is loaded first in any case: a slot falls back on it when the newer one fails.
            if self._work.is_set() and self.restored.is_set():
                return
            if steps:
                await self._attempt(steps[0])
                continue
            if not self._attempts.has_hope(now_s):
                await self._settle(target, now_s)
            due_s = self._attempts.next_due_s(now_s)
            if due_s is None:
                return
            await self._wait(due_s - self._clock.monotonic_s())

    async def _current(self, target: DesiredState) -> Current:
        store, record = self._place.store, self._record
        fallbacks = {entry.slot.manifest_digest: entry.fallback for entry in record.quarantine}
        # Also what a model may fall back on, which would else be fetched for ever.
        slots = [*target.slots, *(slot for slot in fallbacks.values() if slot is not None)]
        digests = {slot.manifest_digest for slot in slots} | record.in_use()
        complete = [digest for digest in digests if await self._place.on_disk(store.is_complete, digest)]
        return Current(
            frozenset(complete),
            dict(self._place.host.running()),
            (record.pins() - self._place.journal.unproven) | self._steps.passed,
            fallbacks,
        )

    async def _wait(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._work.wait()
        except TimeoutError:
            return

    async def _attempt(self, step: Step) -> None:
        try:
            await self._steps.take(step)
        except Interrupted:
            return
        except NanofleetError as error:
            if isinstance(step, FetchSlot):
                stored_bytes, _ = await self._place.on_disk(self._sizes, step.slot.manifest_digest)
                self._attempts.progressed(step.model, stored_bytes)
            self._note_failure(step.model, error)
        except OSError as error:
            self._note_failure(step.model, Unavailable(f"disk: {error.strerror or error}"))
        except Exception as error:
            # The root of a step: a defect in one model's loading must not stop the others.
            _log.exception("step failed unexpectedly", extra={"model": step.model})
            self._note_failure(step.model, InternalError(f"{type(error).__name__}: {error}"))

    def _note_failure(self, model: ModelName, error: NanofleetError) -> None:
        now_s = self._clock.monotonic_s()
        is_known = model in self._attempts.persistent(0.0)
        self._attempts.failed(model, error, now_s=now_s)
        final = model in self._attempts.given_up
        is_news = final or (not is_known and model in self._attempts.persistent(now_s))
        given_up = SlotPhase.WAITING if isinstance(error, PermissionRequired) else SlotPhase.FAILED
        self.board.hold(model, Problem(error.code, str(error)), phase=given_up if final else None)
        level = logging.WARNING if is_news else logging.DEBUG
        _log.log(level, "step failed", extra={"model": model, "reason": str(error), "given_up": final})

    def _show_quarantine(self, target: DesiredState) -> None:
        for model, problem in self._quarantined(target).items():
            runs = self._record.slot_of(self._place.host.running().get(model))
            instead = "nothing runs instead" if runs is None else f"version {runs.version} ({runs.variant}) runs"
            found = Problem(problem.code, f"{problem.message}; {instead}")
            self.board.hold(model, found, phase=SlotPhase.FAILED)

    def _quarantined(self, target: DesiredState) -> Mapping[ModelName, Problem]:
        found = ((slot.model, self._record.quarantined(slot.manifest_digest)) for slot in target.slots)
        return {model: entry.problem for model, entry in found if entry is not None}

    async def _settle(self, target: DesiredState, now_s: float) -> None:
        """Persist what is now in force, then answer."""
        answer = self._answer
        failures = {**self._quarantined(target), **self._attempts.given_up, **self._attempts.persistent(now_s)}
        state = self._in_force(target) if failures else target
        await self._place.on_disk(self._place.journal.save_active, state)
        self._active = state
        self.board.apply(state.position)
        await self._collect(target)
        if answer is not None and not answer.done():
            answer.set_result(PushResult(target.position, _summary(failures.items())))

    def _in_force(self, target: DesiredState) -> DesiredState:
        """Return what a restart must bring back: the last applied state, with those slots of `target` that run."""
        running = self._place.host.running()
        before = {slot.model: slot for slot in (self._active.slots if self._active is not None else ())}
        slots = tuple(
            slot if running.get(slot.model) == slot.manifest_digest else before[slot.model]
            for slot in target.slots
            if running.get(slot.model) == slot.manifest_digest or slot.model in before
        )
        return replace(target, position=self.applied, slots=slots)

    async def _collect(self, target: DesiredState) -> None:
        keep = {
            *self._record.pins(),
            *self._place.host.running().values(),
            *(slot.manifest_digest for slot in target.slots if not self._record.quarantined(slot.manifest_digest)),
        }
        await self._place.on_disk(partial(self._place.store.remove_unneeded, keep=keep))

    async def _first_report(self, slot: Slot) -> SlotReport:
        stored_bytes, total_bytes = await self._place.on_disk(self._sizes, slot.manifest_digest)
        return SlotReport(slot, self._phase_of(slot), stored_bytes, total_bytes)

    def _phase_of(self, slot: Slot) -> SlotPhase:
        if self._place.host.running().get(slot.model) != slot.manifest_digest:
            return SlotPhase.FETCHING
        return SlotPhase.READY if self._record.trial_of(slot.manifest_digest) is None else SlotPhase.PROBATION

    def _sizes(self, digest: Digest) -> tuple[int, int]:
        try:
            manifest = self._place.store.manifest(digest)
        except NanofleetError:
            return 0, 0
        return self._place.store.stored_bytes(manifest), manifest.size_bytes


def _summary(failures: Collection[tuple[ModelName, Problem]]) -> Problem | None:
    """Return one problem for the whole state: the first failure's, and how many more there are."""
    for model, problem in failures:
        more = f" (and {len(failures) - 1} more slots)" if len(failures) > 1 else ""
        return Problem(problem.code, f"{model}: {problem.message}{more}")
    return None
