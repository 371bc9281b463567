"""What the agent puts by itself: usage by hour and model, events; and how records and spans are read back."""

import asyncio
import zlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from core.errors import ErrorCode, InvalidRequest
from core.fleet_state import NOWHERE, Problem, ReportedState, SlotPhase, SlotReport, Usage
from core.ids import ModelName
from edge_agent.outbox.events import Events, news
from edge_agent.outbox.ledger import UsageLedger
from edge_agent.outbox.rows import Kind, Loss
from edge_agent.outbox.storage import Figures
from edge_agent.outbox.telemetry import MAX_EXPORT_BYTES, _inflated
from protos.records.v1 import records_pb2 as pb
from tests.support.clocks import HeldClock
from tests.support.fleet_values import made_slot

HOUR_S = 3600


class KeptRows:
    """An outbox that keeps the newest row of each id."""

    def __init__(self) -> None:
        self.rows: dict[str, pb.Record] = {}
        self.figures: Figures | None = None

    def put(self, kind: Kind, body: bytes, *, dedupe_id: str) -> bool:
        self.rows.pop(dedupe_id, None)
        self.rows[dedupe_id] = pb.Record.FromString(body)
        assert self.rows[dedupe_id].dedupe_id == dedupe_id
        return True

    def usage(self) -> list[tuple[str, int, int]]:
        """Return model, hour and requests answered at the edge."""
        found = [record.usage for record in self.rows.values()]
        return [(usage.model, usage.hour.seconds // HOUR_S, usage.answered_edge) for usage in found]

    def events(self) -> list[tuple[str, str, int]]:
        found = [record.event for record in self.rows.values()]
        return [(event.action, event.target, event.count) for event in found]


class Requests:
    def __init__(self) -> None:
        self.by_model: dict[str, Usage] = {}

    def answer(self, model: str, times: int) -> None:
        known = self.by_model.get(model, Usage(0, 0, 0, 0))
        self.by_model[model] = replace(known, answered_edge=known.answered_edge + times)

    def __call__(self) -> Mapping[str, Usage]:
        return self.by_model


def ledger_of(requests: Requests, outbox: KeptRows, clock: HeldClock) -> UsageLedger:
    return UsageLedger(requests, outbox, boot_id="boot", clock=clock)


def start_hour(clock: HeldClock) -> int:
    return int(clock.now().timestamp()) // HOUR_S


def test_usage_is_kept_by_hour_and_model_and_an_hour_that_grows_is_one_record() -> None:
    clock, requests, outbox = HeldClock(), Requests(), KeptRows()
    ledger, hour = ledger_of(requests, outbox, clock), start_hour(clock)
    requests.answer("digits", 3)
    ledger.flush()
    clock.pass_s(600)
    requests.answer("digits", 2)
    requests.answer("faces", 1)
    ledger.flush()

    assert sorted(outbox.usage()) == [("digits", hour, 5), ("faces", hour, 1)]


def test_what_grows_in_the_next_hour_stands_there_alone() -> None:
    clock, requests, outbox = HeldClock(), Requests(), KeptRows()
    ledger, hour = ledger_of(requests, outbox, clock), start_hour(clock)
    requests.answer("digits", 3)
    clock.pass_s(HOUR_S)
    # The look at the end of the hour still belongs to it.
    ledger.flush()
    requests.answer("digits", 4)
    ledger.flush()

    assert outbox.usage() == [("digits", hour, 3), ("digits", hour + 1, 4)]


@pytest.mark.parametrize("days", [365, -365])
def test_a_clock_that_jumps_moves_no_request_into_another_hour(days: int) -> None:
    clock, requests, outbox = HeldClock(), Requests(), KeptRows()
    ledger, hour = ledger_of(requests, outbox, clock), start_hour(clock)
    requests.answer("digits", 3)
    ledger.flush()
    clock.set(clock.now() + timedelta(days=days))
    requests.answer("digits", 1)
    ledger.flush()

    assert outbox.usage() == [("digits", hour, 4)]


def test_an_idle_hour_writes_nothing() -> None:
    clock, outbox = HeldClock(), KeptRows()
    ledger = ledger_of(Requests(), outbox, clock)
    for _ in range(48):
        clock.pass_s(HOUR_S / 2)
        ledger.flush()

    assert outbox.rows == {}


def report(phase: SlotPhase, *, model: str = "digits", version: int = 1, problem: str = "") -> SlotReport:
    found = Problem(ErrorCode.INTERNAL, problem) if problem else None
    return SlotReport(made_slot(ModelName(model), version), phase, 0, 0, found)


@pytest.mark.parametrize(
    ("before", "after", "action"),
    [
        (None, SlotPhase.PROBATION, "variant.activated"),
        (SlotPhase.LOADING, SlotPhase.READY, "variant.activated"),
        (SlotPhase.PROBATION, SlotPhase.READY, "variant.committed"),
        (SlotPhase.PROBATION, SlotPhase.FAILED, "variant.rolled_back"),
        (SlotPhase.SELF_TEST, SlotPhase.FAILED, "variant.failed"),
    ],
)
def test_what_becomes_of_a_variant_is_told(before: SlotPhase | None, after: SlotPhase, action: str) -> None:
    was = {} if before is None else {report(before).slot.model: report(before)}
    now = {report(after).slot.model: report(after)}

    assert [told for told, _ in news(was, now)] == [action]
    assert news(now, now) == []
    assert [told for told, _ in news(now, {})] == ["variant.removed"]


class Board:
    def __init__(self) -> None:
        self.version, self.state = 0, ReportedState(NOWHERE, ())
        self._changed = asyncio.Event()

    def reported(self) -> ReportedState:
        return self.state

    def show(self, *reports: SlotReport) -> None:
        self.version, self.state = self.version + 1, ReportedState(NOWHERE, reports)
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_beyond(self, version: int) -> int:
        while self.version == version:
            await self._changed.wait()
        return self.version


async def test_the_same_failure_after_a_restart_has_the_same_id() -> None:
    outbox = KeptRows()
    for boot_id in ("one", "two"):
        board = Board()
        board.show(report(SlotPhase.FAILED, problem="its self-test failed; it is not tried again"))
        events = Events(outbox, dict, boot_id=boot_id, clock=HeldClock())
        following = asyncio.ensure_future(events.follow(board))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        following.cancel()

    assert outbox.events() == [("variant.failed", "digits", 1)]


def test_privacy_is_told_in_numbers_and_only_what_is_new() -> None:
    outbox, private = KeptRows(), {("privacy.kept", "digits"): 3}
    events = Events(outbox, lambda: dict(private), boot_id="boot", clock=HeldClock())
    events.tell_sums()
    events.tell_sums()
    private["privacy.kept", "digits"] = 5
    private["privacy.refused", "faces"] = 1
    events.tell_sums()

    assert outbox.events() == [
        ("privacy.kept", "digits", 3),
        ("privacy.kept", "digits", 2),
        ("privacy.refused", "faces", 1),
    ]


def test_losses_of_the_outbox_are_told_by_kind() -> None:
    outbox = KeptRows()
    events = Events(outbox, dict, boot_id="boot", clock=HeldClock())
    outbox.figures = Figures({}, {(Kind.TELEMETRY, Loss.AGE): 7}, None, 0.0)
    events.tell_sums()
    events.tell_sums()

    assert outbox.events() == [("outbox.lost", "telemetry", 7)]


def test_a_record_says_when_it_was_written_in_utc() -> None:
    outbox = KeptRows()
    Events(outbox, dict, boot_id="boot", clock=HeldClock()).tell("clock.jumped", "", "by a year")

    [record] = outbox.rows.values()
    assert record.recorded_at.ToDatetime(UTC) == datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "body",
    [b"", b"no zlib", zlib.compress(b"spans")[:-4], zlib.compress(bytes(MAX_EXPORT_BYTES + 1))],
    ids=["empty", "other", "cut", "bomb"],
)
def test_spans_that_were_damaged_on_disk_are_refused_for_good(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        _inflated(body)
