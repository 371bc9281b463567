"""What every store of agents' records promises; run on each of them."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from controller.records.model import (
    DayUsage,
    Event,
    EventFilter,
    HourUsage,
    Kept,
    KnownEvent,
    Per,
    Told,
    UsageFilter,
)
from controller.records.store import RecordStore
from controller.storage.records import SqlRecordStore
from core.fleet_state import Usage
from core.ids import AgentId
from tests.support.databases import SQL_KINDS, migrated_database
from tests.support.fleet_values import NOON
from tests.support.record_store import MemoryRecordStore

GATE, ROOF = AgentId("gate-1"), AgentId("roof-1")
KEPT = Kept(max_events=100, max_hours=100, kept_for=timedelta(days=400))
JUST_NOW = Told(NOON, timedelta())
HOUR = HourUsage("boot", NOON, "digits", Usage(3, 1, 0, 0), JUST_NOW)
EVENT = Event("1", "variant.activated", "digits", "version 1", 1, JUST_NOW)


@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RecordStore]:
    if request.param == "memory":
        yield MemoryRecordStore()
        return
    async with migrated_database(request, tmp_path) as database:
        yield SqlRecordStore(database)


async def add(store: RecordStore, *told: HourUsage | Event, agent: AgentId = GATE, kept: Kept = KEPT) -> None:
    hours = [each for each in told if isinstance(each, HourUsage)]
    events = [each for each in told if isinstance(each, Event)]
    await store.add(agent, hours, events, now=NOON, kept=kept)


async def usage(store: RecordStore, per: Per = Per.BOTH, **chosen: str) -> Sequence[DayUsage]:
    wanted = UsageFilter(NOON.date() - timedelta(days=30), NOON.date() + timedelta(days=30), per)
    return await store.usage(replace(wanted, **chosen))  # type: ignore[arg-type]  # of the fields that are texts


async def events(store: RecordStore, agent: AgentId = GATE) -> Sequence[KnownEvent]:
    return await store.events(EventFilter(agent, 100))


async def test_hours_are_summed_up_by_day_model_and_agent(store: RecordStore) -> None:
    await add(store, HOUR, replace(HOUR, hour=NOON + timedelta(hours=1)), replace(HOUR, model="faces"))
    await add(store, replace(HOUR, hour=NOON - timedelta(days=1)), agent=ROOF)
    today, yesterday = NOON.date(), NOON.date() - timedelta(days=1)

    assert await usage(store) == [
        DayUsage(today, GATE, "digits", Usage(6, 2, 0, 0)),
        DayUsage(today, GATE, "faces", Usage(3, 1, 0, 0)),
        DayUsage(yesterday, ROOF, "digits", Usage(3, 1, 0, 0)),
    ]
    assert await usage(store, Per.AGENT) == [
        DayUsage(today, GATE, None, Usage(9, 3, 0, 0)),
        DayUsage(yesterday, ROOF, None, Usage(3, 1, 0, 0)),
    ]
    assert [found.usage for found in await usage(store, Per.FLEET)] == [Usage(9, 3, 0, 0), Usage(3, 1, 0, 0)]
    assert [found.model for found in await usage(store, Per.MODEL, agent=GATE)] == ["digits", "faces"]
    assert [found.agent_id for found in await usage(store, Per.BOTH, model="digits")] == [GATE, ROOF]


async def test_days_beyond_those_asked_for_are_left_out(store: RecordStore) -> None:
    await add(store, *(replace(HOUR, hour=NOON - timedelta(days=days)) for days in range(4)))
    wanted = UsageFilter(NOON.date() - timedelta(days=2), NOON.date() - timedelta(days=1), Per.FLEET)

    assert [found.day for found in await store.usage(wanted)] == [wanted.until, wanted.since]
    assert [found.day for found in await store.usage(replace(wanted, limit=1))] == [wanted.until]


async def test_an_hour_that_is_told_twice_counts_once(store: RecordStore) -> None:
    await add(store, HOUR)
    await add(store, HOUR)

    assert [found.usage for found in await usage(store)] == [HOUR.usage]


async def test_of_an_hour_that_is_told_again_the_greater_numbers_count_in_any_order(store: RecordStore) -> None:
    later, earlier = replace(HOUR, usage=Usage(9, 1, 2, 0)), replace(HOUR, usage=Usage(5, 3, 0, 1))
    await add(store, later)
    await add(store, earlier, earlier)

    assert [found.usage for found in await usage(store)] == [Usage(9, 3, 2, 1)]


async def test_the_same_hour_of_another_process_counts_beside_it(store: RecordStore) -> None:
    await add(store, HOUR, replace(HOUR, boot_id="after a restart"))

    assert [found.usage for found in await usage(store)] == [Usage(6, 2, 0, 0)]


@pytest.mark.parametrize("off", [timedelta(days=365), timedelta(days=-20_000)])
async def test_an_hour_of_a_clock_that_cannot_be_right_is_put_where_its_age_says(
    store: RecordStore, off: timedelta
) -> None:
    wrong = replace(HOUR, hour=NOON + off, told=Told(NOON + off, timedelta(days=2)))
    await add(store, wrong)
    # Told again a day later by its age, it stays where it was.
    await add(store, replace(wrong, told=Told(NOON + off, timedelta(days=3))))

    assert [found.day for found in await usage(store)] == [NOON.date() - timedelta(days=2)]


async def test_events_come_back_whole_the_newest_first(store: RecordStore) -> None:
    await add(store, EVENT, replace(EVENT, dedupe_id="2", action="outbox.full", target="", count=7))
    await add(store, EVENT, agent=ROOF)

    found = await events(store)

    assert [(event.action, event.target, event.count) for event in found] == [
        ("outbox.full", "", 7),
        ("variant.activated", "digits", 1),
    ]
    assert {(event.agent_id, event.at, event.received_at) for event in found} == {(GATE, NOON, NOON)}


async def test_an_event_that_is_told_twice_is_kept_once_and_as_it_was(store: RecordStore) -> None:
    await add(store, EVENT)
    await add(store, replace(EVENT, detail="another"), replace(EVENT, dedupe_id="2"), replace(EVENT, dedupe_id="2"))

    assert [event.detail for event in await events(store)] == ["version 1", "version 1"]


async def test_events_can_be_chosen_by_action_and_read_in_pages(store: RecordStore) -> None:
    actions = ("variant.activated", "variantless", "variant.failed")
    await add(store, *(replace(EVENT, dedupe_id=action, action=action) for action in actions))
    newest, _, oldest = await events(store)

    assert await store.events(EventFilter(GATE, 9, action="variant.")) == [newest, oldest]
    assert await store.events(EventFilter(GATE, 9, action="variant.failed")) == [newest]
    assert [event.action for event in await store.events(EventFilter(GATE, 1, before=newest.id))] == ["variantless"]


async def test_an_agent_keeps_a_bounded_number_of_events_and_hours_and_takes_none_of_others(
    store: RecordStore,
) -> None:
    kept = replace(KEPT, max_events=2, max_hours=3)
    await add(store, EVENT, HOUR, agent=ROOF, kept=kept)
    await add(store, *(replace(EVENT, dedupe_id=f"{number}") for number in range(5)), kept=kept)
    await add(store, *(replace(HOUR, hour=NOON - timedelta(hours=number)) for number in range(5)), kept=kept)

    assert len(await events(store)) == 2
    assert [found.usage.answered_edge for found in await usage(store, agent=GATE)] == [9]
    assert len(await events(store, ROOF)) == len(await usage(store, agent=ROOF)) == 1


async def test_what_is_too_old_is_forgotten(store: RecordStore) -> None:
    old = NOON - timedelta(days=100)
    await store.add(GATE, [replace(HOUR, hour=old)], [EVENT], now=old, kept=KEPT)
    await add(store, HOUR, replace(EVENT, dedupe_id="2"))

    assert await store.forget(before=NOON - timedelta(days=1)) == 2
    assert [found.day for found in await usage(store)] == [NOON.date()]
    assert len(await events(store)) == 1


async def test_what_an_agent_says_in_its_own_words_is_kept_on_every_database(store: RecordStore) -> None:
    await add(store, replace(EVENT, detail="a \0 in it", target="\N{SNOWMAN}"))

    [found] = await events(store)
    assert (found.detail.replace("\N{SYMBOL FOR NULL}", "\0"), found.target) == ("a \0 in it", "\N{SNOWMAN}")
