"""A supervised loop starts again whatever happens to it, and ends only with its owner."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from core.backoff import BackoffPolicy
from core.tasks import supervise

AT_ONCE = BackoffPolicy(base_s=0.0, cap_s=1000.0)


class Loop:
    """A run that fails as often as told, then returns, then waits for ever."""

    def __init__(self, *, failures: int) -> None:
        self._failures = failures
        self.runs = 0
        self.waits = asyncio.Event()

    async def run(self) -> None:
        self.runs += 1
        if self.runs <= self._failures:
            raise OSError("away")
        if self.runs > self._failures + 1:
            self.waits.set()
            await asyncio.Event().wait()


async def supervised(run: Callable[[], Awaitable[None]], until: asyncio.Event, *, policy: BackoffPolicy) -> None:
    async with asyncio.timeout(10):
        task = asyncio.create_task(supervise("reader", run, policy=policy))
        await until.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_failures_and_returns_both_start_it_again(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(failures=3)
    with caplog.at_level(logging.DEBUG, logger="core.tasks"):
        await supervised(loop.run, loop.waits, policy=AT_ONCE)
    assert loop.runs == 5
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.DEBUG, logging.DEBUG, logging.INFO]


async def test_a_failure_after_a_long_run_is_the_first_of_its_kind_again(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(failures=2)
    with caplog.at_level(logging.DEBUG, logger="core.tasks"):
        # With a cap of nothing every run is a long one.
        await supervised(loop.run, loop.waits, policy=BackoffPolicy(base_s=0.0, cap_s=0.0))
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING, logging.INFO]


async def test_a_run_that_never_waits_leaves_the_loop_to_others() -> None:
    ended = asyncio.Event()

    async def run() -> None:
        asyncio.get_running_loop().call_soon(ended.set)

    await supervised(run, ended, policy=AT_ONCE)


async def test_its_failure_does_not_end_its_siblings() -> None:
    loop = Loop(failures=1)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(supervise("reader", loop.run, policy=AT_ONCE))
        await loop.waits.wait()
        task.cancel()
