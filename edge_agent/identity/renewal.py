"""Keeps the agent's certificate fresh for the life of the process, and takes new authorities as they are pushed.

    half of the certificate's life is over ─▶ challenge ─▶ child: key, request, proof ─▶ renew ─▶ child: check
        ─▶ write it down ─▶ swap the channel ─▶ the new connection works: forget what was before

Renewal goes over the enrolment port, where only the controller shows a certificate; so it works, by the known key, also
when the agent's own has expired while it was off or offline. Nothing here stops the agent from serving: every failure
is noted in `status`, and tried again after a full-jitter delay.

Time: a machine without a clock starts in 1970. Such a clock is reported and stops nothing: attempts go on, and after a
success a quarter of the certificate's life passes on the clock that never jumps before the next one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from random import random
from typing import Protocol

import grpc

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.errors import NanofleetError, TooLarge, Untrusted
from core.grpc_transport import TlsIdentity
from edge_agent.identity.child import Child
from edge_agent.identity.exchange import MAX_BUNDLE_BYTES, Exchange, Refused, on_disk, text_of
from edge_agent.identity.folder import Identity, IdentityFolder

# Derived: half of the life, and up to a tenth more, so that agents enrolled together do not renew together.
RENEW_AT_RATIO, RENEW_JITTER_RATIO = 0.5, 0.1
# Chosen: against a clock by which every new certificate looks expired; below RENEW_AT_RATIO, so unseen otherwise.
MIN_INTERVAL_RATIO = 0.25
# Chosen: how late a clock that was set meanwhile is noticed.
LOOK_INTERVAL_S = 60.0
# Chosen: controllers date certificates back by minutes, so a clock this far before the beginning is wrong.
CLOCK_TOLERANCE = timedelta(minutes=5)
# Chosen: a pushed bundle must prove itself on the controller that pushed it, which is up.
REACH_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


class Channel(Protocol):
    """What is used of RotatingChannel."""

    def replace(self, credentials: TlsIdentity, /) -> None: ...

    async def reaches_with(self, credentials: TlsIdentity, /, *, timeout_s: float) -> bool: ...

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity: ...


@dataclass(frozen=True, slots=True)
class RenewalStatus:
    """For the status file. `clock_problem` says how this machine's clock contradicts the certificate; "": it does not.

    `last_error` is that of the last attempt; "": it succeeded. `retry_at` is set while the next attempt waits.
    """

    not_after: datetime
    last_error: str = ""
    retry_at: datetime | None = None
    clock_problem: str = ""


class Renewal:
    """Owns the identity while the agent runs; `on_change` hears of every new one besides the channel.

    At most one change at a time, under `_changing`: each is computed from the identity that it replaces.
    """

    def __init__(
        self,
        folder: IdentityFolder,
        channel: Channel,
        *,
        disk: Executor,
        child: Child,
        clock: Clock,
        on_change: Callable[[TlsIdentity], None],
        policy: BackoffPolicy | None = None,
        uniform: Callable[[], float] = random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._folder, self._channel, self._disk, self._child, self._clock = folder, channel, disk, child, clock
        self._on_change = on_change
        self._policy = policy or BackoffPolicy()
        self._backoff = Backoff(self._policy, uniform=uniform)
        self._uniform, self._sleep = uniform, sleep
        self._exchange = Exchange(folder, disk=disk, child=child, clock=clock)
        self._changing = asyncio.Lock()
        self._pushed: asyncio.Queue[bytes] = asyncio.Queue(1)
        self._last_error = ""
        self._retry_at: datetime | None = None
        self._jitter_ratio = RENEW_JITTER_RATIO * uniform()
        # By the monotonic clock; no attempt is made before.
        self._earliest_s = clock.monotonic_s()
        self._is_fresh = False
        self.identity = folder.load()
        self._is_confirmed = not folder.earlier()

    async def run(self) -> None:
        self._warn_of_clock()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._renew_in_time(), name="identity renewal")
            tasks.create_task(self._take_bundles(), name="identity trust")

    def status(self) -> RenewalStatus:
        return RenewalStatus(self.identity.not_after, self._last_error, self._retry_at, self._clock_problem())

    def apply_trust_bundle(self, pem: bytes) -> None:
        """Take `pem`, which came over the controller's session, as the authorities to trust from now on.

        It is looked at later and off the session; the newest one counts. One that does not hold is refused and reported
        in `status`, and the last good one stays; the next session or renewal brings it again.
        """
        if self._pushed.full():
            self._pushed.get_nowait()
        self._pushed.put_nowait(pem)

    async def _renew_in_time(self) -> None:
        while True:
            if not self._is_due():
                await self._confirm_when_used()
                await self._sleep(LOOK_INTERVAL_S)
                continue
            try:
                async with self._changing:
                    await self._renew()
            except NanofleetError as error:
                await self._sleep(self._note_failure(error))

    async def _renew(self) -> None:
        identity = await self._exchange.renew(self.identity)
        self._is_fresh = True
        self._jitter_ratio = RENEW_JITTER_RATIO * self._uniform()
        lifetime_s = (identity.not_after - identity.not_before).total_seconds()
        self._earliest_s = self._clock.monotonic_s() + MIN_INTERVAL_RATIO * lifetime_s
        self._backoff.reset()
        _log.info("certificate renewed", extra={"not_after": identity.not_after.isoformat()})
        await self._adopt(identity)

    async def _take_bundles(self) -> None:
        while True:
            pem = await self._pushed.get()
            try:
                async with self._changing:
                    await self._take_bundle(pem)
            except NanofleetError as error:
                self._last_error = str(error)
                _log.warning("pushed authorities refused", extra={"reason": str(error)})

    async def _take_bundle(self, pem: bytes) -> None:
        if pem == self.identity.tls.trust_bundle:
            return
        if len(pem) > MAX_BUNDLE_BYTES:
            raise TooLarge(f"trust bundle: expected at most {MAX_BUNDLE_BYTES} bytes, got {len(pem)}")
        await self._child("bundle", {"bundle": text_of(pem), "now": self._clock.now().isoformat()})
        tls = replace(self.identity.tls, trust_bundle=pem)
        if not await self._channel.reaches_with(tls, timeout_s=REACH_TIMEOUT_S):
            raise Untrusted(
                "trust bundle: expected one by which this controller is trusted, it cannot be reached by it"
            )
        _log.info("authorities replaced")
        await self._adopt(replace(self.identity, tls=tls))

    async def _adopt(self, identity: Identity) -> None:
        await on_disk(self._disk, self._folder.replace, identity)
        self.identity, self._is_confirmed = identity, False
        self._last_error, self._retry_at = "", None
        self._on_change(identity.tls)
        self._channel.replace(identity.tls)

    async def _confirm_when_used(self) -> None:
        """Forget what was before, once the controller accepts what is now."""
        if self._is_confirmed or self._channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            return
        await on_disk(self._disk, self._folder.confirm)
        self._is_confirmed = True

    def _is_due(self) -> bool:
        if self._clock.monotonic_s() < self._earliest_s:
            return False
        begins, ends = self.identity.not_before, self.identity.not_after
        renew_at = begins + (ends - begins) * (RENEW_AT_RATIO + self._jitter_ratio)
        # By a clock before the beginning, nothing says that the certificate still holds.
        return self._clock.now() >= renew_at or self._is_clock_behind()

    def _is_clock_behind(self) -> bool:
        return self._clock.now() < self.identity.not_before - CLOCK_TOLERANCE

    def _clock_problem(self) -> str:
        now, identity = self._clock.now(), self.identity
        said = f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
        if self._is_clock_behind():
            return f"{said}, before its certificate begins ({identity.not_before:%Y-%m-%d %H:%M}); set the clock"
        if self._is_fresh and now > identity.not_after:
            return f"{said}, after the end of a certificate that is new ({identity.not_after:%Y-%m-%d}); set the clock"
        return ""

    def _warn_of_clock(self) -> None:
        problem = self._clock_problem()
        if problem:
            _log.warning("the clock is wrong", extra={"reason": problem})

    def _note_failure(self, error: NanofleetError) -> float:
        """Remember why an attempt failed; return the delay before the next."""
        delay_s = self._backoff.next_delay_s()
        if isinstance(error, Refused):
            # Asking changes nothing; a person may.
            delay_s = self._policy.cap_s * (1 + self._uniform()) / 2
        level = logging.DEBUG if str(error) == self._last_error else logging.WARNING
        extra = {"reason": str(error), "retry_in_s": round(delay_s, 2)}
        _log.log(level, "certificate not renewed", extra=extra)
        self._last_error = str(error)
        self._retry_at = self._clock.now() + timedelta(seconds=delay_s)
        return delay_s
