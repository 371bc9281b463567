"""Hellos that arrive together are recorded together: one transaction, and so one wait for the disk, for all of them.

When the controller comes back, thousands of agents say hello within seconds. The first in line records its own; while
it waits for the disk, the rest gathers, and the next in line records all of them. Nobody is welcomed before what was
decided about it is durable.
"""

import asyncio
from collections.abc import Sequence

from controller.fleet import use_cases
from controller.fleet.model import Agent
from controller.fleet.store import FleetStore
from core.clock import Clock
from core.fleet_state import AgentHello

# Chosen: some 50 ms of the writer, which others wait for as well.
MAX_TOGETHER = 256


class Greetings:
    def __init__(self, store: FleetStore, *, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiting: list[_Caller] = []
        # Held by the caller that records; the others queue here, in the order in which they came.
        self._recording = asyncio.Lock()

    async def greet(self, hello: AgentHello) -> Agent:
        """Record a hello, durably; return the agent with what it shall run. Raises what the store raises."""
        caller = _Caller(hello)
        self._waiting.append(caller)
        try:
            async with self._recording:
                if caller.agent is None:
                    await self._record(caller)
        finally:
            if caller.agent is None:
                self._waiting.remove(caller)
        assert caller.agent is not None, "recorded by us, or by one before us"
        return caller.agent

    async def _record(self, first: "_Caller") -> None:
        """Record the hello of `first` and of those that came after it; if that fails, each tries for itself."""
        assert self._waiting[0] is first, "callers come to the lock in the order in which they wait"
        together = self._waiting[:MAX_TOGETHER]
        agents = await self._greeted([caller.hello for caller in together])
        for caller, agent in zip(together, agents, strict=True):
            caller.agent = agent
        self._waiting = [caller for caller in self._waiting if caller.agent is None]

    async def _greeted(self, hellos: Sequence[AgentHello]) -> Sequence[Agent]:
        now = self._clock.now()
        return await self._store.run(lambda records: use_cases.greet(records, hellos, now=now))


class _Caller:
    """Compared by identity: an agent may say hello twice."""

    def __init__(self, hello: AgentHello) -> None:
        self.hello = hello
        self.agent: Agent | None = None
