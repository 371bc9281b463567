"""What the dashboard works out before anything is drawn: percentiles, traffic, waterfalls, lists, alerts, texts."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from controller.dashboard.device_list import Device, DeviceQuery, page_of, snapshot_of
from controller.dashboard.latency import LatencyView, figures_of, report_of
from controller.dashboard.overview import alerts_of
from controller.dashboard.remembered import Remembered
from controller.dashboard.texts import ago_text, digest_text, duration_text, percent_text, size_text
from controller.dashboard.traffic import WINDOW_S, counted_of, traffic_of
from controller.dashboard.waterfall import tiers_of, waterfall_of
from controller.fleet.model import Agent, AgentView
from controller.fleet.restoration import Restoration
from controller.fleet.vitals import SeenVitals
from controller.identity.model import AgentIdentity, Ban, PublicKey
from controller.signing.model import RoleStatus, SigningStatus, StagedStatus
from controller.traces.columns import SpanColumns, Which
from controller.traces.model import SpanLine, SpanRecord
from controller.traces.stages import Stage, TierName
from core.errors import InvalidRequest
from core.fleet_state import NOWHERE, DesiredState, MachineHealth, Problem, ReportedState, SlotPhase, SlotReport, Usage
from core.ids import AgentId, SiteId
from tests.support.fleet_values import NOON, HeldClock, made_slot
from tests.support.trace_store import made_span

EDGE = Stage(TierName.EDGE, "request")
NO_SIGNING = SigningStatus((), (), ())


def columns_of(*durations_us: int, first_us: int = 0, step_us: int = 10) -> SpanColumns:
    columns = SpanColumns(max_rows=10_000)
    columns.add(
        [
            SpanLine(
                row, f"{row}", "nanofleet-agent", "process m", first_us + row * step_us, duration_us, row % 4 == 0,
                "north", row % 2 == 0,
            )
            for row, duration_us in enumerate(durations_us, start=1)
        ]
    )  # fmt: skip
    return columns


# ---- latency --------------------------------------------------------------------------------------------------


def test_percentiles_are_exact() -> None:
    report = report_of(columns_of(*range(1, 101)), Which(0, 10_000))

    (row,) = report.rows
    assert (row.stage, row.count, row.max_us) == (EDGE, 100, 100)
    assert (row.p50_us, row.p90_us, row.p99_us) == pytest.approx((50.5, 90.1, 99.01))
    assert row.error_ratio == 0.25
    assert (report.models, report.sites, report.has_spans) == (("m",), ("north",), True)


def test_every_span_stands_in_one_cell_of_the_heat_map() -> None:
    columns = columns_of(0, 1, 9, 10, 11, 999, 1000, 10_000_000, step_us=100)

    figures = figures_of(columns, Which(0, 6000), EDGE)

    assert figures["count"] == 8
    assert sum(map(sum, figures["counts"])) == 8
    assert len(figures["counts"]) == len(figures["duration_edges"]) - 1
    assert all(len(row) == len(figures["time_edges"]) - 1 for row in figures["counts"])


def test_the_series_has_a_value_where_something_was_and_none_elsewhere() -> None:
    figures = figures_of(columns_of(100, 300, first_us=5, step_us=0), Which(0, 60_000_000), EDGE)

    p50 = figures["percentiles"]["p50"]
    assert [value for value in p50 if value is not None] == [200.0]
    assert len(p50) == 60


def test_a_map_begins_with_its_first_span_but_shows_at_least_a_minute() -> None:
    hour_us = 3_600_000_000
    late = figures_of(columns_of(1, first_us=hour_us - 15), Which(0, hour_us), EDGE)
    early = figures_of(columns_of(1, first_us=hour_us // 2 - 10), Which(0, hour_us), EDGE)

    assert late["time_edges"][0] == hour_us - 60_000_000
    assert early["time_edges"][0] == hour_us // 2
    assert late["time_edges"][-1] == early["time_edges"][-1] == hour_us


def test_a_stage_without_spans_has_no_figures() -> None:
    figures = figures_of(columns_of(1), Which(0, 60), Stage(TierName.HEAVY, "compute"))

    assert figures["count"] == 0
    assert figures["counts"] == []


def test_a_tier_that_the_stage_is_not_of_shows_that_tier() -> None:
    view = LatencyView.parsed(range_="", stage="edge.compute", tier="heavy", model="", site="")

    assert view.stage == Stage(TierName.HEAVY, "request")
    assert view.link(stage="heavy.compute") == "/latency?range=1h&stage=heavy.compute&tier=heavy"


@pytest.mark.parametrize("words", [{"range_": "2h"}, {"stage": "edge.lunch"}, {"tier": "attic"}])
def test_what_no_link_of_the_page_says_is_refused(words: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="expected one of"):
        LatencyView.parsed(**{"range_": "", "stage": "", "tier": "", "model": "", "site": "", **words})


def test_traffic_is_of_the_last_minutes() -> None:
    now_us = 10_000_000_000
    columns = columns_of(*[100] * 300, first_us=now_us - 10_000_000, step_us=1)
    columns.add([SpanLine(1000, "old", "nanofleet-agent", "process m", 1, 5, False)])

    traffic = traffic_of(columns, now_us)

    assert (traffic.requests, traffic.requests_per_s) == (300, 300 / WINDOW_S)
    assert (traffic.escalated_ratio, traffic.error_ratio) == (0.5, 0.25)
    assert traffic.line[-1] == 300 / 60


def counting(name: str, per_s: float, escalated: float | None, *, is_online: bool = True) -> Device:
    health = MachineHealth(rss_bytes=1, available_bytes=1, temperature_c=None, load=0.0)
    seen = SeenVitals(Usage(0, 0, 0, 0), NOON, per_s, escalated, health, NOON)
    return Device(replace(a_view(name, is_online=is_online), vitals=seen), None)


def test_what_agents_count_is_added_up_and_its_share_weighted() -> None:
    devices = [counting("a", 3.0, 0.1), counting("b", 1.0, 0.5), counting("c", 2.0, None)]
    devices.append(counting("away", 99.0, 1.0, is_online=False))

    counted = counted_of(devices)

    assert counted is not None
    assert counted.requests_per_s == 6.0
    assert counted.escalated_ratio == pytest.approx(0.2)


def test_where_no_agent_counts_nothing_is_said() -> None:
    assert counted_of([Device(a_view("old"), None)]) is None


def test_without_spans_there_is_no_share_of_anything() -> None:
    traffic = traffic_of(SpanColumns(max_rows=10), 10_000_000_000)

    assert (traffic.requests, traffic.escalated_ratio, traffic.error_ratio, traffic.tiers) == (0, None, None, ())


# ---- waterfall ------------------------------------------------------------------------------------------------


def a_trace(*, skew_us: int = 0) -> list[SpanRecord]:
    ask = made_span(1, "ask m", service="nanofleet-device", start_us=1000, duration_us=1000)
    process = made_span(1, "process m", parent=ask, start_us=1100 + skew_us, duration_us=700)
    compute = made_span(1, "compute", parent=process, start_us=1200 + skew_us, duration_us=500)
    return [compute, process, ask]


def test_a_way_between_machines_has_rows_there_and_back() -> None:
    waterfall = waterfall_of(a_trace())

    rows = [(row.tier, row.name, row.duration_us) for row in waterfall.rows]
    assert rows == [
        ("device", "ask m", 1000),
        ("mqtt", "to the agent", 100),
        ("edge", "process m", 700),
        ("edge", "compute", 500),
        ("mqtt", "back to the device", 200),
    ]
    assert [(row.left, row.width) for row in waterfall.rows][2] == (10, 70)
    assert dict(waterfall.own_us) == {"mqtt": 300, "edge": 700}


def test_a_way_that_the_clocks_deny_is_left_out() -> None:
    assert [row.name for row in waterfall_of(a_trace(skew_us=-500)).rows] == ["ask m", "process m", "compute"]


def test_spans_that_are_each_other_s_parents_are_shown() -> None:
    one, two = made_span(1, "one"), made_span(1, "two")
    ring = [replace(one, parent_span_id=two.span_id), replace(two, parent_span_id=one.span_id)]

    assert {row.name for row in waterfall_of(ring).rows} == {"one", "two"}


def test_tiers_stand_along_the_way() -> None:
    services = ["somebody", "nanofleet-heavy", "nanofleet-agent", "nanofleet-device"]

    assert tiers_of(services) == ["device", "edge", "heavy", "somebody"]


def test_a_long_trace_is_cut() -> None:
    waterfall = waterfall_of([made_span(1) for _ in range(600)])

    assert (len(waterfall.rows), waterfall.span_count, waterfall.is_cut) == (500, 600, True)
    assert all(row.left + row.width <= 100 for row in waterfall.rows)


# ---- devices --------------------------------------------------------------------------------------------------


def a_view(name: str, *, site: str = "north", is_online: bool = True, phase: SlotPhase | None = None) -> AgentView:
    agent_id, slot = AgentId(name), made_slot()
    problem = Problem("disk_full", "no room; free 2 MB") if phase is SlotPhase.FAILED else None
    slots = () if phase is None else (SlotReport(slot, phase, 5, 10, problem),)
    agent = Agent(
        agent_id, SiteId(site), "0.1.0", "boot", ("arch:arm64",), NOON, NOON,
        DesiredState(agent_id, NOWHERE, NOON, (slot,)), ReportedState(NOWHERE, slots),
    )  # fmt: skip
    return AgentView(agent, is_online)


def an_identity(name: str, *, ends: timedelta = timedelta(days=6), ban: Ban | None = None) -> AgentIdentity:
    return AgentIdentity(
        AgentId(name), SiteId("north"), PublicKey(b"key"), None, "1", NOON + ends, NOON, NOON, "token", ban
    )


def test_the_most_urgent_word_stands_for_a_device() -> None:
    ban = Ban(NOON, "stolen")
    states = [
        Device(a_view("a"), None).state,
        Device(a_view("a", is_online=False), None).state,
        Device(a_view("a", phase=SlotPhase.FETCHING), None).state,
        Device(a_view("a", is_online=False, phase=SlotPhase.FAILED), None).state,
        Device(a_view("a", phase=SlotPhase.FAILED), an_identity("a", ban=ban)).state,
    ]

    assert states == ["online", "offline", "fetching", "attention", "banned"]


def test_a_search_looks_at_name_site_model_and_tag_whatever_the_case() -> None:
    fleet = snapshot_of([a_view("gate-1"), a_view("dock-1", site="south")], [])

    def found(text: str) -> list[str]:
        query = DeviceQuery.parsed(text=text, site="", state="", page=1)
        return [device.id for device in page_of(fleet, query).devices]

    assert found("GATE") == ["gate-1"]
    assert found("south") == ["dock-1"]
    assert found("arm64") == found("meter") == ["gate-1", "dock-1"]
    assert found("nothing") == []


def test_pages_hold_fifty_and_the_last_stands_for_those_beyond() -> None:
    fleet = snapshot_of([a_view(f"cam-{number:03}") for number in range(120)], [])

    page = page_of(fleet, DeviceQuery(page=99))

    assert (page.page, page.pages, page.first, len(page.devices)) == (3, 3, 101, 20)
    assert DeviceQuery(text="a b", page=3).link(2) == "/devices?q=a+b&page=2"


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="state: expected one of"):
        DeviceQuery.parsed(text="", site="", state="asleep", page=1)


def test_sites_count_their_devices() -> None:
    fleet = snapshot_of([a_view("a"), a_view("b", is_online=False), a_view("c", phase=SlotPhase.WAITING)], [])

    (site,) = fleet.sites
    assert (site.devices, site.online, site.attention, fleet.online) == (3, 2, 1, 2)


# ---- alerts ---------------------------------------------------------------------------------------------------


def titles(
    views: list[AgentView],
    *,
    signing: SigningStatus = NO_SIGNING,
    restoration: Restoration | None = None,
    after: timedelta = timedelta(),
) -> list[str]:
    fleet = snapshot_of(views, [an_identity("soon", ends=timedelta(hours=30))])
    alerts = alerts_of(fleet, signing, restoration, now=NOON + after)
    assert all(alert.remedy and alert.link.startswith("/") for alert in alerts)
    return [alert.title for alert in alerts]


def test_a_fleet_in_order_raises_no_alert() -> None:
    assert titles([a_view("a", phase=SlotPhase.READY), a_view("b", is_online=False)]) == []


def test_what_failed_comes_before_what_is_away() -> None:
    views = [a_view("away", is_online=False), a_view("broken", phase=SlotPhase.FAILED), a_view("soon")]

    assert titles(views, after=timedelta(minutes=5)) == [
        "meter failed on broken",
        "away has been offline for 5 min",
        "The certificate of soon ends in 1 day",
    ]


def test_a_restore_is_told_before_everything_else_until_it_is_confirmed() -> None:
    restored = Restoration(NOON, NOON - timedelta(days=1), epoch=3)
    views = [a_view("broken", phase=SlotPhase.FAILED)]

    assert titles(views, restoration=restored)[0].startswith("Restored from a backup of ")
    assert titles(views, restoration=replace(restored, confirmed_at=NOON)) == ["meter failed on broken"]


def test_many_failures_are_counted_beyond_the_first() -> None:
    views = [a_view(f"cam-{number}", phase=SlotPhase.FAILED) for number in range(9)]

    assert titles(views)[-1] == "4 more devices with a failed model"


def test_the_catalogue_warns_before_it_ends_and_while_signatures_are_missing() -> None:
    role = RoleStatus("timestamp", 3, NOON + timedelta(days=1), 1, ("k",), ("k",))
    staged = StagedStatus("family-meter", 2, NOON, 1, 2, ("x",))

    assert titles([], signing=SigningStatus((role,), (staged,), ())) == [
        "The catalogue's timestamp ends in 1 day",
        "family-meter version 2 waits for 1 signature",
    ]


# ---- the rest -------------------------------------------------------------------------------------------------


async def test_who_asks_gets_what_was_made_last_and_the_next_is_made_behind_the_scenes() -> None:
    clock, version, made = HeldClock(), 1, 0

    async def make() -> str:
        nonlocal made
        made += 1
        return f"{made} of version {version}"

    kept = Remembered(make, version=lambda: version, clock=clock, pause_s=0, max_age_s=30)
    assert [await kept.get(), await kept.get()] == ["1 of version 1"] * 2
    version = 2
    assert await kept.get() == "1 of version 1"

    running = asyncio.create_task(kept.run())
    seen = kept.look()
    while kept.look() == seen:
        await asyncio.sleep(0)
    assert await kept.get() == "2 of version 2"
    running.cancel()


async def test_what_nobody_announced_is_seen_when_it_is_old_enough() -> None:
    clock, made = HeldClock(), 0

    async def make() -> int:
        nonlocal made
        made += 1
        return made

    kept = Remembered(make, version=lambda: 1, clock=clock, pause_s=0, max_age_s=30)
    assert await kept.get() == 1
    clock.advance(29)
    assert await kept.get() == 1
    clock.advance(1)
    first, second = await asyncio.gather(kept.get(), kept.get())
    assert (first, second) == (2, 2)


def test_numbers_are_told_with_three_digits() -> None:
    assert [size_text(value) for value in (0, 812, 5_700, 313_000, 22_800_000, 2_000_000_000_000)] == [
        "0 B", "812 B", "5.70 kB", "313 kB", "22.8 MB", "2.00 TB"
    ]  # fmt: skip
    assert [duration_text(value) for value in (0, 84.4, 1_240, 99_960, 2_500_000)] == [
        "0 µs", "84 µs", "1.24 ms", "100 ms", "2.50 s"
    ]  # fmt: skip
    assert [percent_text(value) for value in (None, 0, 1, 0.094, 0.0012)] == [
        "\u2013",
        "0 %",
        "100 %",
        "9.4 %",
        "0.12 %",
    ]
    assert digest_text("sha256:" + "ab" * 32) == "abababababab"


def test_times_are_told_in_one_unit() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    spans = (timedelta(seconds=1), timedelta(seconds=70), timedelta(hours=5), timedelta(days=1), timedelta(days=9))

    assert [ago_text(now - span, now) for span in spans] == [
        "just now", "1 min ago", "5 h ago", "1 day ago", "9 days ago"
    ]  # fmt: skip
