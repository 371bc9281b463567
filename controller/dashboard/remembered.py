"""`Remembered`: something costly to make, shown as it was last made, and made again behind the scenes when it changed.

Whoever asks never waits for it, except for the first. It is made again only while somebody asks or looks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from core.clock import Clock

T = TypeVar("T")


class Remembered(Generic[T]):
    """Keep `run` running in a task of the owner: it makes the next."""

    def __init__(
        self,
        make: Callable[[], Awaitable[T]],
        *,
        version: Callable[[], Hashable],
        clock: Clock,
        pause_s: float,
        max_age_s: float,
    ) -> None:
        """Remember what `make` gives.

        Args:
            version: what it depends on; another value than before means that it is to be made again.
            pause_s: so long nothing is made after something was.
            max_age_s: after so long it is made again in any case, for what `version` does not tell; who asks waits.
        """
        self._make = make
        self._version = version
        self._clock = clock
        self._pause_s = pause_s
        self._max_age_s = max_age_s
        self._making = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._made: tuple[T, Hashable, float] | None = None
        self._serial = 0

    async def run(self) -> None:
        """Make the next whenever it is wanted, for ever."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            async with self._making:
                await self._make_next()
            await asyncio.sleep(self._pause_s)

    async def get(self) -> T:
        """Return what was made last."""
        self.look()
        if self._is_over():
            async with self._making:
                if self._is_over():
                    await self._make_next()
        assert self._made is not None
        return self._made[0]

    def look(self) -> int:
        """Return a number that grows whenever another is made, which is soon when something changed."""
        if self._made is None or self._made[1] != self._version():
            self._wanted.set()
        return self._serial

    def _is_over(self) -> bool:
        return self._made is None or self._clock.monotonic_s() - self._made[2] >= self._max_age_s

    async def _make_next(self) -> None:
        # Read before it is made: what changes in between is seen again, not missed.
        version, now_s = self._version(), self._clock.monotonic_s()
        value = await self._make()
        self._made = value, version, now_s
        self._serial += 1
