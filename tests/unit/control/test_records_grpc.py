"""RecordService: what is taken, what is refused alone, what is refused as a whole, and who is told to come back."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.api.records_grpc import MAX_RECORDS, RETRY_AFTER_KEY, RecordServicer
from controller.records.model import EventFilter, Kept, Per, UsageFilter
from controller.records.service import MAX_APPENDING, Records
from core.ids import AgentId
from protos.records.v1 import records_pb2 as pb
from tests.support.clocks import HeldClock
from tests.support.record_store import MemoryRecordStore

GATE = AgentId("gate-1")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Aborted(Exception):
    pass


class FakeContext:
    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.trailers: tuple[tuple[str, str], ...] = ()

    def set_trailing_metadata(self, trailers: tuple[tuple[str, str], ...]) -> None:
        self.trailers = trailers

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise Aborted(details)


class Side:
    def __init__(self) -> None:
        self.clock = HeldClock()
        self.clock.set(NOON)
        self.store = MemoryRecordStore()
        self.records = Records(self.store, clock=self.clock, kept=Kept(1000, 1000, timedelta(days=400)))
        self.servicer = RecordServicer(self.records, agent_of=lambda _: GATE)
        self.context = FakeContext()

    async def append(self, *records: pb.Record) -> list[int]:
        context: Any = self.context
        reply = await self.servicer.Append(pb.AppendRequest(records=records), context)
        return [refusal.index for refusal in reply.refused]

    async def events(self) -> list[str]:
        return [event.action for event in (await self.records.events(EventFilter(GATE, 500))).events]

    async def answered(self) -> int:
        wanted = UsageFilter(NOON.date() - timedelta(days=99), NOON.date(), Per.FLEET)
        return sum(found.usage.answered_edge for found in await self.records.usage(wanted))


@pytest.fixture
def side() -> Side:
    return Side()


def event(dedupe_id: str = "1", **fields: Any) -> pb.Record:
    record = pb.Record(dedupe_id=dedupe_id, event=pb.Event(**{"action": "outbox.full", **fields}))
    record.recorded_at.FromDatetime(NOON)
    return record


def usage(hour: datetime = NOON, **fields: Any) -> pb.Record:
    told = pb.Usage(**{"boot_id": "boot", "model": "digits", "answered_edge": 5, **fields})
    told.hour.FromDatetime(hour)
    record = pb.Record(dedupe_id="boot/1/digits", usage=told)
    record.recorded_at.FromDatetime(hour)
    return record


async def test_what_an_agent_tells_is_kept_and_told_twice_changes_nothing(side: Side) -> None:
    for _ in range(2):
        assert await side.append(usage(), event()) == []

    assert (await side.answered(), await side.events()) == (5, ["outbox.full"])


@pytest.mark.parametrize(
    "bad",
    [
        pb.Record(dedupe_id="1"),
        event(""),
        event("n" * 129),
        event("caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
        event(action=""),
        event(action="a" * 65),
        event(target="t" * 129),
        event(detail="d" * 513),
        event(count=1 << 60),
        usage(boot_id=""),
        usage(model="m" * 65),
        usage(model="\x1b[2J"),
        usage(failed=1 << 63),
        usage(hour=NOON + timedelta(minutes=1)),
    ],
)
async def test_a_record_without_a_meaning_is_refused_alone(side: Side, bad: pb.Record) -> None:
    assert await side.append(event("before"), bad, event("after")) == [1]

    assert await side.events() == ["outbox.full", "outbox.full"]
    assert side.records.refused == 1


async def test_instants_that_no_calendar_has_are_refused(side: Side) -> None:
    record = event()
    record.recorded_at.seconds = 1 << 60

    assert await side.append(record) == [0]


async def test_too_many_records_are_refused_as_a_whole_and_none_is_taken(side: Side) -> None:
    with pytest.raises(Aborted):
        await side.append(*(event(f"{number}") for number in range(MAX_RECORDS + 1)))

    assert side.context.code is grpc.StatusCode.OUT_OF_RANGE
    assert await side.events() == []


async def test_beyond_a_bound_of_batches_an_agent_is_told_when_to_come_back(side: Side) -> None:
    go = asyncio.Event()

    class SlowStore(MemoryRecordStore):
        async def add(self, *arguments: Any, **named: Any) -> None:
            await go.wait()
            await super().add(*arguments, **named)

    side.records = Records(SlowStore(), clock=side.clock, kept=Kept(1000, 1000, timedelta(days=400)))
    side.servicer = RecordServicer(side.records, agent_of=lambda _: GATE)
    under_way = [asyncio.ensure_future(side.append(event(f"{number}"))) for number in range(MAX_APPENDING)]
    await asyncio.sleep(0)
    with pytest.raises(Aborted):
        await side.append(event("one more"))
    go.set()
    await asyncio.gather(*under_way)

    assert side.context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert side.context.trailers == ((RETRY_AFTER_KEY, "10000"),)
    assert side.records.turned_away == 1


async def test_what_a_wrong_clock_says_is_put_where_its_age_is(side: Side) -> None:
    record = usage(hour=datetime(1970, 1, 1, tzinfo=UTC))
    record.age.FromTimedelta(timedelta(days=3))
    await side.append(record)
    wanted = UsageFilter(NOON.date() - timedelta(days=99), NOON.date(), Per.FLEET)

    assert [found.day for found in await side.records.usage(wanted)] == [NOON.date() - timedelta(days=3)]


@given(st.binary(max_size=200))
async def test_no_bytes_of_an_agent_end_in_a_defect(content: bytes) -> None:
    side = Side()
    context: Any = SimpleNamespace(abort=side.context.abort, set_trailing_metadata=lambda _: None)
    try:
        request = pb.AppendRequest.FromString(content)
    except Exception:
        return
    await side.servicer.Append(request, context)
