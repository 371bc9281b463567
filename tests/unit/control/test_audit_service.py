"""The record of who changed what: complete, chained and bounded."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.audit.budget import BURST, REFILL_S
from controller.audit.chain import Links, linked
from controller.audit.model import CONTROLLER, OK, Act, Actor, Entry, Filter, Head, Outcome, Result, nobody
from controller.audit.service import MAX_REPORTS, Audit, Bounds
from core.errors import Forbidden, Unauthenticated
from tests.support.audit_store import MemoryAuditStore
from tests.support.fleet_values import NOON, HeldClock

ADA = Actor("ada", "admin", "192.0.2.1")
BAN = Act(ADA, "agent.ban", "gate-1", "stolen")


class World:
    def __init__(self, *, max_entries: int = 1000, kept_for: timedelta = timedelta(days=1)) -> None:
        self.clock = HeldClock()
        self.store = MemoryAuditStore()
        self.bounds = Bounds(max_entries, kept_for)
        self.audit = self.started()

    def started(self) -> Audit:
        return Audit(self.store, clock=self.clock, bounds=self.bounds)

    async def actions(self) -> list[str]:
        return [entry.act.action for entry in (await self.audit.entries(Filter(100))).entries]


async def test_an_act_becomes_an_entry_with_its_outcome() -> None:
    world = World()
    record = await world.audit.begin(replace(BAN, target="", detail=""))
    await record.describe(target="gate-1", detail="stolen")
    await record.end(Result(Outcome.REFUSED, "conflict"))

    (entry,) = (await world.audit.entries(Filter(10))).entries
    assert (entry.act, entry.result) == (BAN, Result(Outcome.REFUSED, "conflict"))
    assert list(world.store.records.opened()) == []


async def test_an_act_that_a_crash_cut_off_is_told_at_the_next_start() -> None:
    world = World()
    record = await world.audit.begin(Act(ADA, "deployment.put"))
    await record.describe(target="fleet", detail="digits 2 int8")

    again = world.started()
    await again.prepare()
    (entry,) = (await again.entries(Filter(10))).entries
    assert entry.result == Result(Outcome.FAILED, "interrupted")
    assert entry.act.target == "fleet"
    assert entry.act.detail.startswith("digits 2 int8; began at ")


async def test_only_so_many_entries_are_kept_and_the_record_says_so_once() -> None:
    world = World(max_entries=5)
    for _ in range(12):
        await world.audit.record(BAN)

    actions = await world.actions()
    assert len(actions) <= 6
    assert actions.count("audit.bound") == 1
    assert (await world.audit.verify()).problem is None


async def test_old_entries_go_but_the_chain_goes_on_from_the_newest() -> None:
    world = World(kept_for=timedelta(hours=1))
    await world.audit.record(BAN)
    await world.audit.record(BAN)
    world.clock.advance(7200)
    await world.audit.tidy()
    await world.audit.record(BAN)

    found = await world.audit.verify()
    assert (found.problem, found.first and found.first.id, found.last and found.last.id) == (None, 2, 4)


async def test_refusals_of_one_culprit_are_bounded_and_counted() -> None:
    world = World()
    error = Unauthenticated("credential: not known here")
    for _ in range(BURST + 7):
        world.audit.refused(nobody("192.0.2.9"), "credential.show", target="", error=error)
    world.audit.refused(ADA, "operator.add", target="", error=Forbidden("role"))
    assert (await world.actions()).count("credential.show") == BURST
    assert (await world.actions()).count("operator.add") == 1

    world.clock.advance(REFILL_S)
    world.audit.refused(nobody("192.0.2.10"), "credential.show", target="", error=error)
    newest = (await world.audit.entries(Filter(1))).entries[0]
    assert newest.act.detail == "after 7 more that were not written down"


async def test_reports_beyond_the_bound_are_dropped_not_kept_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    world = World(max_entries=2 * MAX_REPORTS)
    for number in range(MAX_REPORTS + 3):
        world.audit.decided("authority.prepare", str(number), "")

    await world.audit.flush()
    assert len(world.store.records.entries) == MAX_REPORTS
    assert [record.levelname for record in caplog.records if "lost" in record.message] == ["ERROR"]


async def test_pages_follow_each_other_to_the_oldest_entry() -> None:
    world = World()
    for _ in range(5):
        await world.audit.record(BAN)

    pages, before = [], None
    while True:
        page = await world.audit.entries(Filter(2, before=before))
        pages.append([entry.id for entry in page.entries])
        if (before := page.next_before) is None:
            break
    assert pages == [[5, 4], [3, 2], [1]]


async def test_a_noted_head_shows_that_the_end_was_cut_off() -> None:
    world = World()
    for _ in range(3):
        await world.audit.record(BAN)
    noted = (await world.audit.verify()).last
    assert noted is not None
    assert (await world.audit.verify(noted)).problem is None

    world.store.records.entries.pop()
    assert (await world.audit.verify()).problem is None
    assert "cut off" in str((await world.audit.verify(noted)).problem)


async def test_a_noted_head_shows_that_the_chain_was_made_anew() -> None:
    world = World()
    await world.audit.record(BAN)
    noted = (await world.audit.verify()).last

    world.store.records.entries = [linked(None, replace(BAN, target="gate-2"), OK, at=NOON)]
    assert (await world.audit.verify()).problem is None
    assert "noted hash" in str((await world.audit.verify(noted)).problem)


CHAIN_LENGTH = 6


def chain() -> list[Entry]:
    made: list[Entry] = []
    for number in range(CHAIN_LENGTH):
        act = Act(CONTROLLER, "agent.quarantine", f"gate-{number}")
        made.append(linked(made[-1] if made else None, act, OK, at=NOON + timedelta(seconds=number)))
    return made


TAMPERED: list[Callable[[Entry], Entry]] = [
    lambda entry: replace(entry, at=entry.at + timedelta(microseconds=1)),
    lambda entry: replace(entry, act=replace(entry.act, target="gate-x")),
    lambda entry: replace(entry, act=replace(entry.act, actor=ADA)),
    lambda entry: replace(entry, result=Result(Outcome.FAILED)),
    lambda entry: replace(entry, sha256="0" * 64),
    lambda entry: linked(None, replace(entry.act, detail="other"), OK, at=entry.at),
]


@given(st.integers(1, CHAIN_LENGTH - 2), st.sampled_from(TAMPERED))
def test_a_change_in_the_middle_is_found(index: int, tamper: Callable[[Entry], Entry]) -> None:
    entries = chain()
    entries[index] = tamper(entries[index])
    links = Links()
    links.follow(entries)

    found = links.found()
    assert found.problem is not None
    assert found.broken_at in (entries[index].id, index + 1, index + 2)


@given(st.integers(1, CHAIN_LENGTH - 2))
def test_an_entry_taken_out_is_missed(index: int) -> None:
    entries = chain()
    del entries[index]
    links = Links()

    assert not links.follow(entries)
    assert "taken out" in str(links.found().problem)


def test_a_whole_chain_is_found_whole() -> None:
    links, entries = Links(), chain()

    assert links.follow(entries)
    found = links.found()
    assert (found.entries, found.problem) == (CHAIN_LENGTH, None)
    assert found.last == Head(CHAIN_LENGTH, entries[-1].sha256)
