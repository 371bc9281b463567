"""What every store of traces promises; run on each of them."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.storage.database import Database
from controller.storage.traces import SqlTraceStore
from controller.traces.model import AttributeValue, TraceFilter
from controller.traces.store import TraceStore
from tests.support.trace_store import MemoryTraceStore, made_span

MANY = 1000


@pytest.fixture(params=["memory", "sql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TraceStore]:
    if request.param == "memory":
        yield MemoryTraceStore()
        return
    database = Database(f"sqlite:///{tmp_path / 'traces.sqlite'}")
    await database.migrate()
    yield SqlTraceStore(database)
    await database.close()


async def test_a_span_comes_back_whole(store: TraceStore) -> None:
    attributes: dict[str, AttributeValue] = {
        "tier": "edge",
        "batch": 3,
        "confidence": 0.875,
        "escalated": False,
        "note": "ünïcode",
    }
    span = made_span(1, "queue", parent=made_span(1), is_error=True, attributes=attributes)

    await store.add([span], max_spans=MANY)

    assert list(await store.trace(span.trace_id)) == [span]


async def test_the_spans_of_a_trace_come_by_start(store: TraceStore) -> None:
    late, early, other = made_span(1, start_us=20), made_span(1, start_us=10), made_span(2, start_us=15)
    await store.add([late, early, other], max_spans=MANY)

    assert list(await store.trace(late.trace_id)) == [early, late]


async def test_a_span_that_comes_twice_is_kept_once(store: TraceStore) -> None:
    span = made_span(1)
    await store.add([span, span], max_spans=MANY)
    await store.add([span], max_spans=MANY)

    assert list(await store.trace(span.trace_id)) == [span]


async def test_an_unknown_trace_is_empty(store: TraceStore) -> None:
    assert list(await store.trace("0" * 32)) == []


async def test_adding_nothing_is_allowed(store: TraceStore) -> None:
    await store.add([], max_spans=MANY)

    assert list(await store.recent(TraceFilter())) == []


async def test_the_oldest_rows_go_beyond_the_bound(store: TraceStore) -> None:
    spans = [made_span(number) for number in range(1, 8)]
    for span in spans:
        await store.add([span, span], max_spans=3)

    kept = [span.trace_id for span in spans if await store.trace(span.trace_id)]

    assert kept == [span.trace_id for span in spans[-3:]]


async def test_a_batch_over_the_bound_leaves_its_end(store: TraceStore) -> None:
    spans = [made_span(number) for number in range(1, 8)]
    await store.add(spans, max_spans=3)

    assert len(await store.recent(TraceFilter(limit=100))) == 3


async def test_a_summary_says_what_the_trace_is(store: TraceStore) -> None:
    ask = made_span(1, "ask meter", service="nanofleet-device", start_us=1000, duration_us=500)
    process = made_span(1, "process meter", parent=ask, start_us=1100, duration_us=700)
    compute = made_span(1, "compute", parent=process, start_us=1200, duration_us=10, is_error=True)
    await store.add([compute, process, ask], max_spans=MANY)

    (summary,) = await store.recent(TraceFilter())

    assert (summary.root_name, summary.start_us, summary.duration_us) == ("ask meter", 1000, 800)
    assert summary.services == ("nanofleet-agent", "nanofleet-device")
    assert (summary.span_count, summary.has_error) == (3, True)


async def test_without_the_root_the_earliest_orphan_names_the_trace(store: TraceStore) -> None:
    lost = made_span(1, "ask meter")
    process = made_span(1, "process meter", parent=lost, start_us=10)
    compute = made_span(1, "compute", parent=process, start_us=5)
    await store.add([process, compute], max_spans=MANY)

    (summary,) = await store.recent(TraceFilter())

    assert summary.root_name == "process meter"


async def test_the_newest_traces_come_first_and_only_so_many(store: TraceStore) -> None:
    await store.add([made_span(number, start_us=number * 10) for number in range(1, 6)], max_spans=MANY)

    found = await store.recent(TraceFilter(limit=2))

    assert [summary.start_us for summary in found] == [50, 40]


async def test_a_filter_by_service_takes_traces_with_any_span_of_it(store: TraceStore) -> None:
    mixed = made_span(1, service="nanofleet-heavy")
    await store.add([mixed, made_span(1), made_span(2)], max_spans=MANY)

    (summary,) = await store.recent(TraceFilter(service="nanofleet-heavy"))

    assert (summary.trace_id, summary.span_count) == (mixed.trace_id, 2)


async def test_a_filter_by_model_takes_traces_about_it(store: TraceStore) -> None:
    about = made_span(1, "process meter")
    await store.add([about, made_span(2, "process meter-large"), made_span(3, "meter")], max_spans=MANY)

    found = await store.recent(TraceFilter(model="meter"))

    assert [summary.trace_id for summary in found] == [about.trace_id]


async def test_parents_in_a_ring_still_make_a_summary(store: TraceStore) -> None:
    first = made_span(1, "first", start_us=1)
    second = made_span(1, "second", parent=first, start_us=2)
    await store.add([replace(first, parent_span_id=second.span_id), second], max_spans=MANY)

    (summary,) = await store.recent(TraceFilter())

    assert summary.root_name == "first"


async def test_lines_come_in_the_order_of_their_rows_from_where_one_was(store: TraceStore) -> None:
    attributes: dict[str, AttributeValue] = {"nanofleet.site": "north", "nanofleet.escalated": True}
    first, second = made_span(1, "process m", attributes=attributes), made_span(1, "compute", is_error=True)
    third = made_span(2, start_us=1)
    await store.add([first, second, third], max_spans=MANY)

    lines = list(await store.lines_after(0, limit=2))

    assert [(line.trace_id, line.name, line.is_error) for line in lines] == [
        (first.trace_id, "process m", False),
        (second.trace_id, "compute", True),
    ]
    assert [(line.site, line.is_escalated) for line in lines] == [("north", True), (None, None)]
    assert [line.trace_id for line in await store.lines_after(lines[-1].row, limit=9)] == [third.trace_id]


async def test_lines_of_rows_that_left_are_not_there_and_later_ones_are(store: TraceStore) -> None:
    spans = [made_span(number) for number in range(1, 6)]
    await store.add(spans, max_spans=MANY)
    (first,) = await store.lines_after(0, limit=1)
    await store.add([made_span(6)], max_spans=2)

    assert [line.trace_id for line in await store.lines_after(first.row, limit=9)] == [f"{5:032x}", f"{6:032x}"]


async def test_an_attribute_of_the_wrong_kind_says_nothing(store: TraceStore) -> None:
    attributes: dict[str, AttributeValue] = {"nanofleet.site": 3, "nanofleet.escalated": "yes"}
    await store.add([made_span(1, attributes=attributes)], max_spans=MANY)

    (line,) = await store.lines_after(0, limit=1)

    assert (line.site, line.is_escalated) == (None, None)


async def test_summaries_are_of_those_asked_for_that_are_here(store: TraceStore) -> None:
    await store.add([made_span(number, start_us=number) for number in range(1, 5)], max_spans=MANY)

    found = await store.summaries([f"{number:032x}" for number in (1, 3, 9)])

    assert [summary.trace_id for summary in found] == [f"{3:032x}", f"{1:032x}"]
