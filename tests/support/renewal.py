"""What a Renewal needs, as fakes: a clock that its own sleeping moves, a channel that connects to nothing."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from core.backoff import BackoffPolicy
from core.grpc_transport import TlsIdentity
from edge_agent.identity.__main__ import COMMANDS
from edge_agent.identity.child import Child
from edge_agent.identity.folder import Identity, IdentityFolder
from edge_agent.identity.renewal import Channel, Renewal

POLICY = BackoffPolicy(base_s=1.0, cap_s=120.0)


class SleptClock:
    """Starts at the real time, or at `now`; passes only while somebody sleeps, and then at once."""

    def __init__(self, now: datetime | None = None) -> None:
        self._now = now or datetime.now(UTC)
        self._monotonic_s = 0.0
        self.delays_s: list[float] = []

    def now(self) -> datetime:
        return self._now

    def set(self, now: datetime) -> None:
        """Set the wall clock, as the network's time does."""
        self._now = now

    def monotonic_s(self) -> float:
        return self._monotonic_s

    async def sleep(self, seconds: float) -> None:
        self.delays_s.append(seconds)
        self._now += timedelta(seconds=seconds)
        self._monotonic_s += seconds
        await asyncio.sleep(0)


class FakeChannel:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.replaced: list[TlsIdentity] = []
        self.state = grpc.ChannelConnectivity.IDLE
        self.is_reachable = True

    def replace(self, credentials: TlsIdentity, /) -> None:
        self.replaced.append(credentials)

    async def reaches_with(self, credentials: TlsIdentity, /, *, timeout_s: float) -> bool:
        return self.is_reachable

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.state


async def in_this_process(command: str, body: Mapping[str, str], /) -> dict[str, str]:
    """Do what the child process does, without one."""
    return COMMANDS[command](body)


class Keeper:
    """A renewal and what surrounds it, on the folder `path` that holds `identity`."""

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        clock: SleptClock,
        channel: Channel | None = None,
        child: Child = in_this_process,
        disk: ThreadPoolExecutor,
    ) -> None:
        self.folder = IdentityFolder(path)
        self.folder.replace(identity)
        self.clock = clock
        self.channel = FakeChannel()
        self.changed = asyncio.Event()
        self.renewal = Renewal(
            self.folder,
            channel or self.channel,
            disk=disk,
            child=child,
            clock=clock,
            on_change=lambda _: self.changed.set(),
            policy=POLICY,
            uniform=lambda: 0.5,
            sleep=clock.sleep,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.renewal.run())
        try:
            async with asyncio.timeout(20):
                yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def until_changed(self) -> Identity:
        """Return the next identity, once it is in use."""
        await self.changed.wait()
        self.changed.clear()
        return self.renewal.identity

    async def until_failed(self, words: str) -> None:
        """Wait until the last attempt failed with `words`; renewal must be under way."""
        while words not in self.renewal.status().last_error:
            await asyncio.sleep(0.001)
