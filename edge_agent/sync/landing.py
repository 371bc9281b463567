"""Putting verified chunks on the disk while the next one arrives: one after the other, on the thread of the store."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from types import TracebackType
from typing import Self

from core.chunks import ChunkRef
from edge_agent.sync.worklist import Worklist


class Landing:
    """Used in an `async with` block, which ends when the last chunk is on the disk and counted, or cancelled.

    The thread wakes the loop once for each chunk: a second time, to say that it is done, would cost a fiftieth of all
    that a fetch takes (measured).
    """

    def __init__(self, disk: Executor, work: Worklist) -> None:
        self._disk = disk
        self._work = work
        self._last: Future[None] | None = None
        # Set by the thread.
        self._failure: Exception | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Cancelled, nobody waits: the write ends all the same, before whatever the thread does next.
        if self._last is None or (error is not None and not isinstance(error, Exception)):
            return
        await asyncio.wrap_future(self._last)
        if error is None:
            self._require_success()

    async def put(self, ref: ChunkRef, content: bytes | memoryview) -> None:
        """Have a chunk put where it belongs, and wait until it gets there even if this process is killed.

        Raises:
            DiskFull, Unavailable: it cannot be written, or the one before it.
        """
        loop = asyncio.get_running_loop()
        is_safe: asyncio.Future[None] = loop.create_future()
        self._last = self._disk.submit(self._write, ref, content, partial(loop.call_soon_threadsafe, _resolve, is_safe))
        await is_safe
        self._require_success()

    def _write(self, ref: ChunkRef, content: bytes | memoryview, on_safe: Callable[[], object]) -> None:
        if self._failure is None:
            try:
                self._work.put(ref, content, on_safe)
            except Exception as error:
                self._failure = error
        if self._failure is not None:
            on_safe()

    def _require_success(self) -> None:
        if self._failure is not None:
            raise self._failure


def _resolve(future: "asyncio.Future[None]") -> None:
    """Let go whoever waits; also one that does not wait any more, or was let go before."""
    if not future.done():
        future.set_result(None)
