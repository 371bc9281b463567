"""When to connect: after a random delay at start, and with full-jitter backoff after every end.

A controller that is away is asked again within `cap_s`; one that says when to come back is not asked before; one that
refuses this agent (unknown, forbidden) is asked no more often than every half `cap_s`, since asking changes nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from random import random
from typing import Protocol

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.errors import ErrorCode, Untrusted
from edge_agent.link.session import Replaced, SessionEnded, SessionState

# Chosen: a connection that held this long was a working one, so its end starts a new series of attempts.
STABLE_S = 10.0

# Codes by which a controller says no to this agent as it is.
REFUSALS = frozenset(
    {
        ErrorCode.FORBIDDEN,
        ErrorCode.NOT_FOUND,
        ErrorCode.INVALID_REQUEST,
        ErrorCode.CONFLICT,
        ErrorCode.TOO_LARGE,
    }
)

_log = logging.getLogger(__name__)


def _end_if_cancelled() -> None:
    """Raise CancelledError if this task shall end: a session that fails at the same instant says only that it failed.

    A TaskGroup that has an error to raise forgets that its own task was cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@dataclass(frozen=True, slots=True)
class ReconnectPolicy:
    base_s: float = 1.0
    cap_s: float = 120.0
    first_delay_s: float = 1.0


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """Where the link stands, and since when it is open or not.

    `last_error` is kept over a recovery; `retry_at` is set while the next attempt waits.
    """

    state: SessionState
    since: datetime
    last_error: str = ""
    retry_at: datetime | None = None


class OneConnection(Protocol):
    async def run(self) -> None: ...


class Link:
    """Keeps one session open for the life of the process."""

    def __init__(
        self,
        connect: Callable[[Callable[[SessionState], None]], OneConnection],
        *,
        policy: ReconnectPolicy,
        clock: Clock,
        uniform: Callable[[], float] = random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._connect = connect
        self._policy = policy
        self._clock = clock
        self._uniform = uniform
        self._sleep = sleep
        self._backoff = Backoff(BackoffPolicy(base_s=policy.base_s, cap_s=policy.cap_s), uniform=uniform)
        self._opened_at_s: float | None = None
        self._pausing: asyncio.Future[None] | None = None
        self.status = LinkStatus(SessionState.CLOSED, clock.now())

    async def run(self) -> None:
        await self._pause(self._policy.first_delay_s * self._uniform())
        while True:
            self._opened_at_s = None
            try:
                await self._connect(self._note_state).run()
            except Replaced:
                _log.info("connecting to the controller anew")
                # Authorities are replaced on all agents at once: they come back spread over a base.
                await self._pause(self._policy.base_s * self._uniform())
            except SessionEnded as ended:
                _end_if_cancelled()
                delay_s = self._delay_s(ended)
                self._note_end(ended, delay_s)
                await self._pause(delay_s)

    def retry_now(self) -> None:
        """End the wait for the next attempt, if there is one: what made the last ones fail may be gone."""
        self._backoff.reset()
        if self._pausing is not None:
            self._pausing.cancel()

    async def _pause(self, delay_s: float) -> None:
        self._pausing = asyncio.ensure_future(self._sleep(delay_s))
        try:
            # Not awaited itself: its being cancelled is no wish to end this task.
            await asyncio.wait([self._pausing])
        finally:
            self._pausing.cancel()
            self._pausing = None

    def _delay_s(self, ended: SessionEnded) -> float:
        if self._opened_at_s is not None and self._clock.monotonic_s() - self._opened_at_s >= STABLE_S:
            self._backoff.reset()
        delay_s = self._backoff.next_delay_s()
        # A peer that is not the controller says nothing for it: a portal in between goes, a wrong clock is set.
        if ended.because.code in REFUSALS and not isinstance(ended.because, Untrusted):
            delay_s = self._policy.cap_s * (1 + self._uniform()) / 2
        if ended.retry_after_s is not None:
            # Everybody was told the same: spread over another base.
            delay_s = max(delay_s, ended.retry_after_s + self._policy.base_s * self._uniform())
        return delay_s

    def _note_state(self, state: SessionState) -> None:
        if state is SessionState.OPEN:
            self._opened_at_s = self._clock.monotonic_s()
        turned = (state is SessionState.OPEN) is not (self.status.state is SessionState.OPEN)
        since = self._clock.now() if turned else self.status.since
        self.status = replace(self.status, state=state, since=since, retry_at=None)

    def _note_end(self, ended: SessionEnded, delay_s: float) -> None:
        reason = str(ended)
        first = self._opened_at_s is not None or reason != self.status.last_error
        _log.log(
            logging.WARNING if first else logging.DEBUG,
            "no connection to the controller",
            extra={"reason": reason, "retry_in_s": round(delay_s, 2)},
        )
        retry_at = self._clock.now() + timedelta(seconds=delay_s)
        self.status = replace(self.status, last_error=reason, retry_at=retry_at)
