"""What every store of the audit record promises; run on each of them."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from controller.audit.chain import linked
from controller.audit.model import OK, Act, Actor, Entry, Filter, OpenAct, Outcome, Result
from controller.audit.store import AuditRecords, AuditStore
from controller.storage.audit import SqlAuditStore
from tests.support.audit_store import MemoryAuditStore
from tests.support.databases import SQL_KINDS, migrated_database
from tests.support.fleet_values import NOON

ADA, BOB = Actor("ada", "admin", "192.0.2.1"), Actor("bob", "viewer", "2001:db8::1")
ACTS = (
    (Act(ADA, "agent.ban", "gate-1", "stolen"), OK),
    (Act(BOB, "agent.unban", "gate-1"), Result(Outcome.REFUSED, "forbidden")),
    (Act(ADA, "agentless.act", "gate-2"), OK),
    (Act(ADA, "deployment.put", "fleet", "digits 1 int8"), Result(Outcome.FAILED, "internal")),
)


@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AuditStore]:
    if request.param == "memory":
        yield MemoryAuditStore()
        return
    async with migrated_database(request, tmp_path) as database:
        yield SqlAuditStore(database)


async def fill(store: AuditStore) -> list[Entry]:
    """Add ACTS, a minute apart."""
    made: list[Entry] = []
    for number, (act, result) in enumerate(ACTS):
        made.append(linked(made[-1] if made else None, act, result, at=NOON + timedelta(minutes=number)))

    def add_all(records: AuditRecords) -> None:
        for entry in made:
            records.add(entry)

    await store.run(add_all)
    return made


async def found(store: AuditStore, wanted: Filter) -> Sequence[Entry]:
    return await store.read(lambda records: records.found(wanted))


async def test_entries_come_back_whole_the_newest_first(store: AuditStore) -> None:
    made = await fill(store)

    assert await found(store, Filter(10)) == made[::-1]
    assert await found(store, Filter(2)) == made[:1:-1]
    assert await store.read(lambda records: records.newest()) == made[-1]


async def test_entries_are_found_by_what_they_say(store: AuditStore) -> None:
    first, second, third, fourth = await fill(store)

    assert await found(store, Filter(10, before=3)) == [second, first]
    assert await found(store, Filter(10, operator="ada")) == [fourth, third, first]
    assert await found(store, Filter(10, action="agent.ban")) == [first]
    assert await found(store, Filter(10, action="agent.")) == [second, first]
    assert await found(store, Filter(10, target="gate-1")) == [second, first]
    assert await found(store, Filter(10, since=third.at)) == [fourth, third]
    assert await found(store, Filter(10, operator="ada", target="gate-1")) == [first]
    assert await found(store, Filter(10, action="agen%.")) == []


async def test_entries_follow_in_their_order(store: AuditStore) -> None:
    made = await fill(store)

    assert await store.read(lambda records: records.after(0, limit=3)) == made[:3]
    assert await store.read(lambda records: records.after(3, limit=3)) == made[3:]


async def test_the_oldest_entries_go(store: AuditStore) -> None:
    made = await fill(store)

    assert await store.read(lambda records: records.newest_before(made[2].at)) == 2
    assert await store.read(lambda records: records.newest_before(made[0].at)) == 0
    assert await store.run(lambda records: records.remove_through(2)) == 2
    assert await found(store, Filter(10)) == made[:1:-1]


async def test_an_empty_record_has_no_newest_entry(store: AuditStore) -> None:
    assert await store.read(lambda records: records.newest()) is None


async def test_an_open_act_is_known_until_it_is_closed(store: AuditStore) -> None:
    act = ACTS[0][0]
    first = await store.run(lambda records: records.open(act, at=NOON))
    second = await store.run(lambda records: records.open(replace(act, target=""), at=NOON))
    await store.run(lambda records: records.describe(second, ACTS[3][0]))

    both = [OpenAct(first, NOON, act), OpenAct(second, NOON, ACTS[3][0])]
    assert await store.read(lambda records: records.opened()) == both
    await store.run(lambda records: records.close(first))
    assert await store.read(lambda records: records.opened()) == both[1:]
