"""Statistics over recent spans: which span is which stage, and what the columns answer."""

import asyncio

import pytest

from controller.traces.columns import SpanColumns, Which
from controller.traces.model import SpanLine, SpanRecord
from controller.traces.service import Traces
from controller.traces.stages import STAGES, WHOLE, Stage, TierName, model_of, stage_of
from controller.traces.statistics import Statistics
from tests.support.trace_store import MemoryTraceStore, made_span

EVERYTHING = Which(0, 1 << 53)
EDGE = Stage(TierName.EDGE, WHOLE)
COMPUTE = Stage(TierName.EDGE, "compute")


def line(
    row: int,
    trace: str,
    name: str,
    *,
    service: str = "nanofleet-agent",
    start_us: int = 100,
    duration_us: int = 10,
    site: str | None = None,
    is_escalated: bool | None = None,
) -> SpanLine:
    return SpanLine(row, trace, service, name, start_us, duration_us, False, site, is_escalated)


def a_request(row: int, trace: str, model: str, site: str, *, start_us: int = 100) -> list[SpanLine]:
    """Return what an agent sends: the stages before the request that they were in."""
    return [
        line(row, trace, "queue", start_us=start_us, site=site),
        line(row + 1, trace, "compute", start_us=start_us + 1, site=site),
        line(row + 2, trace, f"process {model}", start_us=start_us, site=site, is_escalated=False),
    ]


@pytest.mark.parametrize(
    ("service", "name", "expected"),
    [
        ("nanofleet-device", "ask digits", Stage(TierName.DEVICE, WHOLE)),
        ("nanofleet-agent", "process digits", EDGE),
        ("nanofleet-agent", "infer digits", EDGE),
        ("nanofleet-agent", "queue", Stage(TierName.EDGE, "queue")),
        ("nanofleet-controller", "infer digits", Stage(TierName.GATEWAY, WHOLE)),
        ("nanofleet-controller", "heavy", Stage(TierName.GATEWAY, "heavy")),
        ("nanofleet-heavy", "compute", Stage(TierName.HEAVY, "compute")),
        ("nanofleet-agent", "process", None),
        ("nanofleet-device", "compute", None),
        ("somebody-else", "ask digits", None),
    ],
)
def test_the_stage_of_a_span(service: str, name: str, expected: Stage | None) -> None:
    assert stage_of(service, name) == expected
    assert expected is None or expected in STAGES


def test_only_the_span_of_a_request_names_a_model() -> None:
    assert model_of("process digits") == "digits"
    assert model_of("compute") is None
    assert model_of("GET /health") is None


def test_a_filter_by_model_or_site_takes_every_stage_of_the_requests() -> None:
    columns = SpanColumns(max_rows=100)
    columns.add(a_request(1, "a", "digits", "north") + a_request(4, "b", "words", "south"))

    by_model = columns.select(Which(0, 1000, model="digits"))
    by_site = columns.select(Which(0, 1000, site="south"))

    assert len(by_model.start_us) == 3
    assert len(by_model.of(COMPUTE).start_us) == 1
    assert len(by_site.start_us) == 3
    assert len(columns.select(Which(0, 1000, model="digits", site="south")).start_us) == 0
    assert len(columns.select(Which(0, 1000, model="nobody's")).start_us) == 0
    assert (columns.models, columns.sites) == (["digits", "words"], ["north", "south"])


def test_an_escalated_request_counts_for_the_model_that_the_device_asked_for() -> None:
    columns = SpanColumns(max_rows=100)
    columns.add(
        [
            line(1, "a", "infer large", service="nanofleet-heavy"),
            line(2, "a", "infer large", service="nanofleet-controller"),
            line(3, "a", "process nano", is_escalated=True, site="north"),
        ]
    )

    found = columns.select(Which(0, 1000, model="nano"))

    assert len(found.start_us) == 3
    assert found.escalated.tolist() == [1, 1, 1]
    assert len(columns.select(Which(0, 1000, model="large")).start_us) == 0


def test_time_is_from_inclusive_until_exclusive() -> None:
    columns = SpanColumns(max_rows=100)
    columns.add([line(row, "a", "compute", start_us=row * 10) for row in range(1, 5)])

    assert columns.select(Which(20, 40)).start_us.tolist() == [20, 30]


def test_a_filter_by_tier_takes_its_stages_only() -> None:
    columns = SpanColumns(max_rows=100)
    columns.add([line(1, "a", "process digits"), line(2, "a", "heavy", service="nanofleet-controller")])

    assert len(columns.select(Which(0, 1000, tier=TierName.GATEWAY)).start_us) == 1


def test_traces_come_by_their_last_matching_span_and_only_so_many() -> None:
    columns = SpanColumns(max_rows=100)
    for number, trace in enumerate("abcd"):
        columns.add([line(number + 1, trace, "process m", start_us=number, duration_us=number * 100)])

    assert columns.trace_ids(EVERYTHING, limit=2) == ["d", "c"]
    assert columns.trace_ids(EVERYTHING, limit=9, at_least_us=100, below_us=300) == ["c", "b"]
    assert columns.trace_ids(Which(0, 1000, stage=COMPUTE), limit=9) == []


def test_the_oldest_rows_leave_and_their_traces_with_them() -> None:
    columns = SpanColumns(max_rows=8)
    for number in range(100):
        columns.add([line(number + 1, f"trace {number}", "process m", start_us=number, site=f"site {number % 2}")])

    assert 8 <= len(columns) <= 10
    assert columns.trace_ids(EVERYTHING, limit=1) == ["trace 99"]
    assert "trace 50" not in columns.trace_ids(EVERYTHING, limit=1000)
    assert columns.select(Which(0, 1000, site="site 1")).start_us.tolist()[-1] == 99


async def test_statistics_follow_what_is_stored() -> None:
    store = MemoryTraceStore()
    traces = Traces(store, max_spans=100)
    statistics = Statistics(traces, max_rows=100)

    async def store_spans(*spans: SpanRecord) -> None:
        traces.take_in(spans)
        await traces.flush()

    assert await statistics.ask(len) == 0
    await store_spans(made_span(1, "process m"), made_span(2, "process m"))
    assert await statistics.ask(len) == 2
    await store_spans(made_span(3, "process m"))
    answers = await asyncio.gather(*(statistics.ask(len) for _ in range(5)))
    assert answers == [3] * 5
    await statistics.close()
