"""Forwarding without a network: in order, at least once, over the disk or without one."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from controller.traces.forward import Accepted, Forwarder, Later, Never
from controller.traces.otlp import span_count
from controller.traces.spool import Spool, SpoolBounds
from core.backoff import BackoffPolicy
from core.clock import SystemClock
from tests.support.otlp import made_otlp_span, made_request

BOUNDS = SpoolBounds(1 << 20, 3600.0)
FAST = BackoffPolicy(base_s=0.001, cap_s=0.002)


class FakeCollector:
    """Answers with `outcome`; remembers what it took, by the name of each first span."""

    def __init__(self) -> None:
        self.outcome: Accepted | Later | Never = Accepted()
        self.requests = 0
        self.asked: list[str] = []
        self.taken: list[str] = []
        self._changed = asyncio.Condition()

    async def export(self, payload: bytes) -> Accepted | Later | Never:
        request = ExportTraceServiceRequest.FromString(payload)
        # A request of ours has one resource; requests that go together have one each.
        names = [resource.scope_spans[0].spans[0].name for resource in request.resource_spans]
        outcome = Never("INVALID_ARGUMENT: poison") if "poison" in names else self.outcome
        async with self._changed:
            self.requests += 1
            self.asked += names
            if isinstance(outcome, Accepted):
                self.taken += names
            self._changed.notify_all()
        return outcome

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(is_so)


def forwarder_to(collector: FakeCollector, folder: Path, **bounds: int) -> Forwarder:
    return Forwarder(
        collector,
        partial(Spool, folder, BOUNDS),
        clock=SystemClock(),
        max_age_s=BOUNDS.max_age_s,
        backoff=FAST,
        disk_retry_s=0.01,
        **bounds,
    )


def named(name: str, *, spans: int = 1) -> ExportTraceServiceRequest:
    return made_request(*[made_otlp_span(name=name) for _ in range(spans)])


@asynccontextmanager
async def running(forwarder: Forwarder) -> AsyncIterator[None]:
    task = asyncio.create_task(forwarder.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await forwarder.close()


async def settled(forwarder: Forwarder, is_so: Callable[[], bool]) -> None:
    """Return when the forwarder has done what it does after a call."""
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.001)


async def test_requests_arrive_in_order_and_are_counted(tmp_path: Path) -> None:
    collector = FakeCollector()
    forwarder = forwarder_to(collector, tmp_path)
    async with running(forwarder):
        for number in range(50):
            forwarder.offer(named(str(number), spans=2))
        await settled(forwarder, lambda: forwarder.counters.forwarded == 100)
    assert collector.taken == [str(number) for number in range(50)]
    assert (forwarder.counters.shed, forwarder.counters.refused, forwarder.counters.spooled_bytes) == (0, 0, 0)
    assert list(tmp_path.iterdir()) == []


async def test_what_the_collector_has_not_taken_is_sent_by_the_next_process(tmp_path: Path) -> None:
    collector = FakeCollector()
    collector.outcome = Later("away")
    forwarder = forwarder_to(collector, tmp_path)
    async with running(forwarder):
        forwarder.offer(named("one"))
        forwarder.offer(named("two"))
        await collector.until(lambda: len(collector.asked) >= 3)
        assert forwarder.counters.spooled_bytes > 0
    assert collector.asked[0] == "one"
    assert collector.taken == []

    collector.outcome = Accepted()
    follower = forwarder_to(collector, tmp_path)
    async with running(follower):
        await settled(follower, lambda: follower.counters.forwarded == 2)
    assert collector.taken == ["one", "two"]


async def test_requests_that_wait_go_together(tmp_path: Path) -> None:
    collector = FakeCollector()
    forwarder = forwarder_to(collector, tmp_path)
    for number in range(500):
        forwarder.offer(named(str(number)))
    await forwarder.close()
    follower = forwarder_to(collector, tmp_path)
    async with running(follower):
        await settled(follower, lambda: follower.counters.forwarded == 500)
    assert collector.taken == [str(number) for number in range(500)]
    assert collector.requests <= 2


async def test_a_request_that_is_refused_costs_none_of_those_that_went_with_it(tmp_path: Path) -> None:
    collector = FakeCollector()
    forwarder = forwarder_to(collector, tmp_path)
    for name in ("one", "poison", "two"):
        forwarder.offer(named(name))
    async with running(forwarder):
        await settled(forwarder, lambda: forwarder.counters.forwarded == 2)
    assert collector.taken == ["one", "two"]
    assert (forwarder.counters.refused, forwarder.counters.shed) == (1, 0)


async def test_what_was_offered_and_never_run_is_stored_at_the_end(tmp_path: Path) -> None:
    collector = FakeCollector()
    forwarder = forwarder_to(collector, tmp_path)
    forwarder.offer(named("one"))
    await forwarder.close()
    follower = forwarder_to(collector, tmp_path)
    async with running(follower):
        await collector.until(lambda: collector.taken == ["one"])


async def test_what_is_refused_is_counted_and_not_sent_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collector = FakeCollector()
    collector.outcome = Never("INVALID_ARGUMENT: no")
    forwarder = forwarder_to(collector, tmp_path)
    async with running(forwarder):
        for name in ("one", "two"):
            forwarder.offer(named(name, spans=3))
        await settled(forwarder, lambda: forwarder.counters.refused == 6)
    assert set(collector.asked) == {"one", "two"}
    assert collector.taken == []
    assert [record.levelname for record in caplog.records if "refused" in record.message] == ["WARNING"]


async def test_spans_that_are_rejected_in_part_are_counted_apart(tmp_path: Path) -> None:
    collector = FakeCollector()
    collector.outcome = Accepted(rejected=1)
    forwarder = forwarder_to(collector, tmp_path)
    async with running(forwarder):
        forwarder.offer(named("one", spans=3))
        await settled(forwarder, lambda: forwarder.counters.forwarded == 2)
    assert forwarder.counters.refused == 1


async def test_the_collector_is_left_alone_for_as_long_as_it_wants(tmp_path: Path) -> None:
    collector = FakeCollector()
    collector.outcome = Later("throttled", after_s=0.3)
    forwarder = forwarder_to(collector, tmp_path)
    loop = asyncio.get_running_loop()
    async with running(forwarder):
        forwarder.offer(named("one"))
        await collector.until(lambda: len(collector.asked) == 1)
        started_s = loop.time()
        collector.outcome = Accepted()
        await collector.until(lambda: len(collector.taken) == 1)
    assert loop.time() - started_s >= 0.29


async def test_without_a_disk_spans_wait_in_memory_and_go_out_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    collector = FakeCollector()
    forwarder = forwarder_to(collector, tmp_path / "spool")
    async with running(forwarder):
        for number in range(5):
            forwarder.offer(named(str(number)))
        await collector.until(lambda: len(collector.taken) == 5)
        assert not forwarder.counters.is_spooling
    assert collector.taken == [str(number) for number in range(5)]
    assert [record.levelname for record in caplog.records if "cannot be written" in record.message] == ["WARNING"]


async def test_a_disk_that_comes_back_takes_what_waited_in_memory_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.write_text("a file where the folder should be")
    collector = FakeCollector()
    collector.outcome = Later("away")
    forwarder = forwarder_to(collector, folder)
    async with running(forwarder):
        for number in range(5):
            forwarder.offer(named(str(number)))
        await settled(forwarder, lambda: not forwarder.counters.is_spooling)
        await collector.until(lambda: len(collector.asked) >= 1)
        folder.unlink()
        await settled(forwarder, lambda: forwarder.counters.is_spooling and forwarder.counters.spooled_bytes > 0)
        forwarder.offer(named("5"))
        collector.outcome = Accepted()
        await collector.until(lambda: len(collector.taken) == 6)
    assert collector.taken == [str(number) for number in range(6)]


async def test_memory_is_bounded_when_disk_and_collector_are_away(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    collector = FakeCollector()
    collector.outcome = Later("away")
    size_bytes = named("00", spans=2).ByteSize()
    forwarder = forwarder_to(collector, tmp_path / "spool", max_queued_bytes=3 * size_bytes)
    async with running(forwarder):
        for number in range(10, 20):
            forwarder.offer(named(str(number), spans=2))
            assert forwarder.counters.queued_bytes <= 3 * size_bytes
        assert forwarder.counters.shed == 14
        collector.outcome = Accepted()
        await settled(forwarder, lambda: forwarder.counters.forwarded == 6)
    assert collector.taken == ["17", "18", "19"]


async def test_a_disk_that_is_full_for_a_while_loses_nothing_and_keeps_the_order(tmp_path: Path) -> None:
    is_full = [False]

    def write(file: int, content: bytes) -> int:
        if is_full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(file, content)

    collector = FakeCollector()
    collector.outcome = Later("away")
    forwarder = Forwarder(
        collector,
        lambda: Spool(tmp_path, BOUNDS, write=write),
        clock=SystemClock(),
        max_age_s=3600.0,
        backoff=FAST,
        disk_retry_s=0.01,
    )
    async with running(forwarder):
        forwarder.offer(named("on disk"))
        await settled(forwarder, lambda: forwarder.counters.spooled_bytes > 0)
        is_full[0] = True
        forwarder.offer(named("in memory"))
        await settled(forwarder, lambda: not forwarder.counters.is_spooling)
        is_full[0] = False
        forwarder.offer(named("on disk again"))
        await settled(forwarder, lambda: forwarder.counters.is_spooling)
        collector.outcome = Accepted()
        await collector.until(lambda: len(collector.taken) == 3)
    assert collector.taken == ["on disk", "in memory", "on disk again"]


async def test_what_waits_for_too_long_is_shed(tmp_path: Path) -> None:
    collector = FakeCollector()
    collector.outcome = Later("away")
    bounds = SpoolBounds(1 << 20, 0.05)
    forwarder = Forwarder(
        collector, partial(Spool, tmp_path, bounds), clock=SystemClock(), max_age_s=0.05, backoff=FAST
    )
    async with running(forwarder):
        request = named("one", spans=4)
        forwarder.offer(request)
        await settled(forwarder, lambda: forwarder.counters.shed == span_count(request))
        assert forwarder.counters.spooled_bytes == 0
