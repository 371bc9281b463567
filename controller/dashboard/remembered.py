"""`Remembered`: something costly to make, made again only when what it was made from has changed."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from core.clock import Clock

T = TypeVar("T")


class Remembered(Generic[T]):
    """At most one is being made; whoever asks meanwhile waits for that one."""

    def __init__(
        self,
        make: Callable[[], Awaitable[T]],
        *,
        version: Callable[[], Hashable],
        clock: Clock,
        at_most_every_s: float,
        at_least_every_s: float,
    ) -> None:
        """Remember what `make` gives.

        Args:
            version: what it depends on; another value than before means that it is to be made again.
            at_most_every_s: so long it may be behind `version`, however often that changes.
            at_least_every_s: after so long it is made again in any case, for what `version` does not tell.
        """
        self._make = make
        self._version = version
        self._clock = clock
        self._at_most_every_s = at_most_every_s
        self._at_least_every_s = at_least_every_s
        self._making = asyncio.Lock()
        self._made: tuple[T, Hashable, float] | None = None

    async def get(self) -> T:
        async with self._making:
            if self._made is not None and self._is_good(*self._made[1:]):
                return self._made[0]
            # Read before it is made: what changes in between is seen again, not missed.
            version, now_s = self._version(), self._clock.monotonic_s()
            value = await self._make()
            self._made = value, version, now_s
            return value

    def _is_good(self, version: Hashable, made_s: float) -> bool:
        age_s = self._clock.monotonic_s() - made_s
        return age_s < self._at_most_every_s or (version == self._version() and age_s < self._at_least_every_s)
