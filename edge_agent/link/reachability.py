"""Whether the heavy tier can be reached, known from probes and never found out by somebody's request.

    a session opens                        one probe (`ServerReady`); when it says ready, no other: idle costs no byte
    the session ends, the breaker opens    unreachable at once; a probe every few seconds, then every minute, until
                                           one says ready

Before anything is known a request may try: it finds the breaker of `cascade.offload`. Who only waits to send what was
kept (`Gate`) waits until a probe or a session has proven that somebody is there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import random
from typing import TypeAlias

import grpc
import grpc.aio

from core.clock import Clock
from protos.inference.v2 import open_inference_pb2 as pb
from protos.inference.v2.open_inference_pb2_grpc import GRPCInferenceServiceStub

# Chosen: how often is looked at what costs nothing to look at.
LOOK_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 5.0
# What gRPC says of itself when nobody answered.
_NOBODY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What a probe found out."""

    is_controller_there: bool
    is_heavy_ready: bool


Probe: TypeAlias = Callable[[], Awaitable[Found]]


@dataclass(frozen=True, slots=True)
class ProbePolicy:
    """Intervals grow from `first_s` to `cap_s` by half; each is spread by a quarter."""

    first_s: float = 5.0
    cap_s: float = 60.0


class ServerReadyProbe:
    """Asks the gateway over the agent's one channel: some hundred bytes, and no work for anybody."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = GRPCInferenceServiceStub(channel)

    async def __call__(self) -> Found:
        try:
            answer = await self._stub.ServerReady(pb.ServerReadyRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return Found(error.code() not in _NOBODY, is_heavy_ready=False)
        return Found(is_controller_there=True, is_heavy_ready=answer.ready)


@dataclass(frozen=True, slots=True)
class Gate:
    """For whoever waits until somebody is there."""

    is_there: asyncio.Event

    async def until_reachable(self) -> None:
        await self.is_there.wait()


class Reachability:
    """Keep `run` running; it reads `is_link_open` and `breaker_openings` (how often so far) once a second."""

    def __init__(
        self,
        probe: Probe,
        *,
        is_link_open: Callable[[], bool],
        breaker_openings: Callable[[], int],
        clock: Clock,
        policy: ProbePolicy = ProbePolicy(),
        uniform: Callable[[], float] = random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._probe = probe
        self._is_link_open = is_link_open
        self._breaker_openings = breaker_openings
        self._clock = clock
        self._policy = policy
        self._uniform = uniform
        self._sleep = sleep
        # None: not known yet.
        self._is_controller_there: bool | None = None
        self._is_heavy_ready: bool | None = None
        self._was_open = False
        self._openings = 0
        self._interval_s = policy.first_s
        self._probe_at_s = clock.monotonic_s() + policy.first_s * uniform()
        self._listeners: list[Callable[[bool], None]] = []
        self.controller, self.heavy = Gate(asyncio.Event()), Gate(asyncio.Event())
        self.probes = 0

    def is_reachable(self) -> bool:
        """Say whether the heavy tier is to be asked now; before anything is known it is."""
        return self._is_controller_there is not False and self._is_heavy_ready is not False

    def is_controller_reachable(self) -> bool:
        """Say whether somebody proved to be at the controller's address."""
        return self._is_controller_there is True

    def on_change(self, hear: Callable[[bool], None]) -> None:
        """Have `hear` told whenever `is_reachable` turns."""
        self._listeners.append(hear)

    async def run(self) -> None:
        while True:
            await self.look()
            await self._sleep(LOOK_INTERVAL_S)

    async def look(self) -> None:
        """Take note of how link and breaker stand, and probe when it is time to."""
        is_open, was_open, self._was_open = self._is_link_open(), self._was_open, self._is_link_open()
        if is_open and not was_open:
            self._believe(controller=True, heavy=self._is_heavy_ready)
            self._probe_at_s = self._clock.monotonic_s()
        if was_open and not is_open:
            self._believe(controller=False, heavy=False)
            self._hurry()
        openings, self._openings = self._breaker_openings() - self._openings, self._breaker_openings()
        if openings and self._is_heavy_ready is not False:
            self._believe(controller=self._is_controller_there, heavy=False)
            self._hurry()
        if not self._is_heavy_ready and self._clock.monotonic_s() >= self._probe_at_s:
            await self._ask()

    async def _ask(self) -> None:
        self.probes += 1
        found = await self._probe()
        # An open session is more than a probe can prove.
        self._believe(controller=found.is_controller_there or self._is_link_open(), heavy=found.is_heavy_ready)
        self._plan_next()

    def _hurry(self) -> None:
        self._interval_s = self._policy.first_s
        self._plan_next()

    def _plan_next(self) -> None:
        self._probe_at_s = self._clock.monotonic_s() + self._interval_s * (0.75 + 0.5 * self._uniform())
        self._interval_s = min(self._policy.cap_s, 1.5 * self._interval_s)

    def _believe(self, *, controller: bool | None, heavy: bool | None) -> None:
        before = self.is_reachable()
        self._is_controller_there, self._is_heavy_ready = controller, heavy
        _turn(self.controller.is_there, to=controller is True)
        _turn(self.heavy.is_there, to=controller is True and heavy is True)
        if self.is_reachable() is not before:
            _log.info("whether the heavy tier can be reached has changed", extra={"is_reachable": not before})
            for hear in self._listeners:
                hear(not before)


def _turn(event: asyncio.Event, *, to: bool) -> None:
    if to:
        event.set()
    else:
        event.clear()
