"""Chunks land in order, the next may come once one cannot be lost, and no failure stays unheard."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from core.errors import DiskFull
from edge_agent.sync.landing import Landing

ONE, TWO = cast("Any", "one"), cast("Any", "two")


class Work:
    """Writes that end when they are let; `safe` ones cannot be lost as soon as they have begun."""

    def __init__(self, *, is_safe_at_once: bool = True) -> None:
        self._is_safe_at_once = is_safe_at_once
        self.may_end = threading.Event()
        self.written: list[object] = []
        self.fails: set[object] = set()

    def put(self, ref: object, _content: bytes, on_safe: Callable[[], object]) -> None:
        if self._is_safe_at_once:
            on_safe()
        assert self.may_end.wait(10)
        if ref in self.fails:
            raise DiskFull(f"no room for {ref}")
        self.written.append(ref)
        if not self._is_safe_at_once:
            on_safe()


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def landing(disk: ThreadPoolExecutor, work: Work) -> Landing:
    return Landing(disk, cast("Any", work))


async def test_the_next_chunk_may_come_while_one_that_is_safe_is_written(disk: ThreadPoolExecutor) -> None:
    work = Work()
    async with landing(disk, work) as chunks:
        await chunks.put(ONE, b"")
        assert work.written == []
        work.may_end.set()
        await chunks.put(TWO, b"")
    assert work.written == [ONE, TWO]


async def test_a_write_that_could_be_lost_is_waited_for(disk: ThreadPoolExecutor) -> None:
    work = Work(is_safe_at_once=False)
    async with landing(disk, work) as chunks:
        putting = asyncio.create_task(chunks.put(ONE, b""))
        assert not (await asyncio.wait([putting], timeout=0.05))[0]
        work.may_end.set()
        await putting
        assert work.written == [ONE]


async def bring(disk: ThreadPoolExecutor, work: Work, *chunks: object, then: BaseException | None = None) -> None:
    async with landing(disk, work) as landed:
        for chunk in chunks:
            await landed.put(cast("Any", chunk), b"")
            if then is not None:
                raise then
            work.may_end.set()


async def test_a_failure_of_the_last_chunk_is_raised_at_the_end(disk: ThreadPoolExecutor) -> None:
    work = Work()
    work.fails.add(ONE)
    with pytest.raises(DiskFull, match="no room for one"):
        await bring(disk, work, ONE)


async def test_after_a_failure_nothing_more_is_written(disk: ThreadPoolExecutor) -> None:
    work = Work()
    work.fails.add(ONE)
    with pytest.raises(DiskFull, match="no room for one"):
        await bring(disk, work, ONE, TWO)
    assert work.written == []


async def test_leaving_with_an_error_waits_for_what_is_under_way_and_raises_that_error(
    disk: ThreadPoolExecutor,
) -> None:
    work = Work()
    work.fails.add(ONE)
    asyncio.get_running_loop().call_later(0.05, work.may_end.set)
    with pytest.raises(ZeroDivisionError):
        await bring(disk, work, ONE, then=ZeroDivisionError())
    assert work.may_end.is_set()


async def test_cancelled_it_waits_for_nothing(disk: ThreadPoolExecutor) -> None:
    work = Work()
    with pytest.raises(asyncio.CancelledError):
        await bring(disk, work, ONE, then=asyncio.CancelledError())
    assert work.written == []
    work.may_end.set()
