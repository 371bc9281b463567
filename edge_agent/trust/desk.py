"""The desk: where pushes arrive. Each is verified by the gate, then handed to the reconciler, and answered once.

A push overtakes whatever is being verified before it: only the newest matters. One that could not be verified for want
of current metadata or room is answered as such at once, and tried again by `run`, which its owner keeps running; what
comes of it then shows in the reported state. A state that is stated anew while it is worked on has one answer,
which the push before it waits for. Nothing that runs is touched before a push is verified.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from random import random
from typing import Protocol

from core.backoff import Backoff, BackoffPolicy
from core.digest import Digest
from core.errors import Conflict, NanofleetError, Untrusted
from core.fleet_state import NOWHERE, DesiredState, Position, Problem, PushResult, SignedAssignment
from core.ids import AgentId
from core.logs import peer_text
from edge_agent.trust.gate import Admitted, decoded
from edge_agent.trust.terms import ManifestTerms

# Chosen: metadata that expired is renewed by a person, a controller that restarts is back in seconds.
RETRY_POLICY = BackoffPolicy(base_s=2.0, cap_s=300.0)

_log = logging.getLogger(__name__)


class Gate(Protocol):
    async def admit(
        self, signed: SignedAssignment, *, agent_id: AgentId, tags: Collection[str], running: Collection[Digest]
    ) -> Admitted: ...


class Reconciling(Protocol):
    """What is used of the reconciler."""

    @property
    def applied(self) -> Position: ...

    def submit(self, desired: DesiredState) -> "asyncio.Future[PushResult]":
        """Return the answer to come, shared with others; raise when the state is refused at once."""
        ...


class Admissions(Protocol):
    """Who needs to know what was admitted."""

    def admit(self, terms: Mapping[Digest, ManifestTerms], *, running: Collection[Digest]) -> None: ...


class TrustDesk:
    """`in_force` says which manifests need no catalogue any more: those that were applied, and those that run."""

    def __init__(
        self,
        gate: Gate,
        reconciler: Reconciling,
        admissions: Admissions,
        *,
        agent_id: AgentId,
        tags: Collection[str],
        in_force: Callable[[], Collection[Digest]],
        policy: BackoffPolicy = RETRY_POLICY,
        uniform: Callable[[], float] = random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._gate = gate
        self._reconciler = reconciler
        self._admissions = admissions
        self._agent_id = agent_id
        self._tags = frozenset(tags)
        self._in_force = in_force
        self._backoff = Backoff(policy, uniform=uniform)
        self._sleep = sleep
        self._verifying: asyncio.Task[Admitted] | None = None
        # The newest push, when it is to be verified again; at most one.
        self._put_off: SignedAssignment | None = None
        self._has_put_off = asyncio.Event()
        self._admitted: DesiredState | None = None
        # What a push waits for; the reconciler's answers are shared by all who submit the same state.
        self._awaited: asyncio.Future[PushResult] | None = None

    async def push(self, signed: SignedAssignment) -> PushResult | None:
        """Verify and apply; return how it went, None when a push before it waits for the same answer.

        Cancelling it leaves nothing under way but what was applied.
        """
        position = NOWHERE
        try:
            position = decoded(signed).position
            self._supersede()
            self._backoff.reset()
            return await self._applied(await self._verified(signed))
        except NanofleetError as error:
            if error.retryable:
                self._put_off = signed
                self._has_put_off.set()
            _log.warning("assignment refused", extra={"reason": peer_text(str(error)), "position": position})
            return PushResult(position, Problem(error.code, str(error)))

    async def run(self) -> None:
        """Verify again what could not be verified, for ever."""
        while True:
            await self._has_put_off.wait()
            await self._sleep(self._backoff.next_delay_s())
            signed = self._put_off
            if signed is not None:
                await self._retry(signed)

    async def _retry(self, signed: SignedAssignment) -> None:
        try:
            admitted = await self._verified(signed)
        except NanofleetError as error:
            if self._put_off is signed and not error.retryable:
                self._supersede()
            _log.debug("assignment still refused", extra={"reason": peer_text(str(error))})
            return
        if self._put_off is not signed:
            return
        self._supersede()
        try:
            self._submit(admitted)
        except NanofleetError as error:
            _log.warning("assignment refused", extra={"reason": peer_text(str(error))})

    def _supersede(self) -> None:
        """Drop what is being verified or waits for it."""
        if self._verifying is not None:
            self._verifying.cancel()
        self._put_off = None
        self._has_put_off.clear()

    async def _verified(self, signed: SignedAssignment) -> Admitted:
        verifying = asyncio.create_task(
            self._gate.admit(signed, agent_id=self._agent_id, tags=self._tags, running=self._in_force()),
            name="verification",
        )
        self._verifying = verifying
        try:
            return await verifying
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Conflict("overtaken by a newer assignment while it was verified") from None
        except Untrusted:
            self._withdraw(decoded(signed).position)
            raise
        finally:
            if self._verifying is verifying:
                self._verifying = None

    def _withdraw(self, refused: Position) -> None:
        """A fresh statement about the state that was admitted does not hold any more: what is not in force, stops."""
        if self._admitted is not None and self._admitted.position == refused:
            self._admissions.admit({}, running=self._in_force())

    async def _applied(self, admitted: Admitted) -> PushResult | None:
        if admitted.desired.position == self._reconciler.applied:
            # Stated anew, with a later expiry.
            return PushResult(admitted.desired.position)
        answer = self._submit(admitted)
        if answer is self._awaited:
            # A state that takes hours is stated anew every few minutes: waiting each time would deafen the session.
            return None
        self._awaited = answer
        try:
            return await asyncio.shield(answer)
        finally:
            if self._awaited is answer:
                self._awaited = None

    def _submit(self, admitted: Admitted) -> "asyncio.Future[PushResult]":
        desired = admitted.desired
        before = self._admitted
        if before is not None and (before.position, before.slots) == (desired.position, desired.slots):
            # The same state, stated anew: the reconciler is at it.
            desired = before
        answer = self._reconciler.submit(desired)
        self._admitted = desired
        self._admissions.admit(admitted.allowed, running=self._in_force())
        return answer
