"""A number that grows with every change, for those who look again only when there is something new to see."""

import asyncio


class Changes:
    def __init__(self) -> None:
        self.revision = 0
        self._next = asyncio.Event()

    def announce(self) -> None:
        self.revision += 1
        self._next.set()
        self._next = asyncio.Event()

    async def after(self, seen: int, *, timeout_s: float) -> int:
        """Wait until the revision is not `seen`, or for `timeout_s`; return the revision then."""
        if self.revision == seen:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._next.wait()
            except TimeoutError:
                pass  # Nothing changed, which is an answer.
        return self.revision
