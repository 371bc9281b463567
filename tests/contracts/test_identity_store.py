"""What every store of identity promises; run on each of them."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from controller.identity.model import AgentIdentity, Authority, AuthorityState, Ban, PublicKey, TokenRecord
from controller.identity.store import IdentityRecords, IdentityStore
from controller.storage.identity import SqlIdentityStore
from core.errors import Forbidden
from core.ids import AgentId
from tests.support.databases import SQL_KINDS, migrated_database
from tests.support.fleet_values import CAM, NOON, NORTH
from tests.support.identity_store import MemoryIdentityStore

ACTIVE = Authority("aa" * 32, "-----BEGIN", AuthorityState.ACTIVE, NOON)
RETIRED = Authority("bb" * 32, "-----BEGIN", AuthorityState.RETIRED, NOON - timedelta(days=1), NOON)
TOKEN = TokenRecord("t1", "cc" * 32, NORTH, None, 1, "ada", NOON, NOON + timedelta(hours=1))
IDENTITY = AgentIdentity(
    agent=CAM,
    site=NORTH,
    key=PublicKey(b"key one"),
    previous_key=None,
    serial="1f" * 20,
    not_after=NOON + timedelta(days=7),
    enrolled_at=NOON,
    renewed_at=NOON,
    token_id="t1",
)


@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[IdentityStore]:
    if request.param == "memory":
        yield MemoryIdentityStore()
        return
    async with migrated_database(request, tmp_path) as database:
        yield SqlIdentityStore(database)


async def test_authorities_come_back_whole_the_oldest_first(store: IdentityStore) -> None:
    await store.run(lambda records: records.save_authority(ACTIVE))
    await store.run(lambda records: records.save_authority(RETIRED))

    assert await store.read(lambda records: list(records.authorities())) == [RETIRED, ACTIVE]


async def test_a_deleted_authority_is_gone(store: IdentityStore) -> None:
    await store.run(lambda records: records.save_authority(ACTIVE))

    await store.run(lambda records: records.delete_authority(ACTIVE.sha256))

    assert await store.read(lambda records: list(records.authorities())) == []


@pytest.mark.parametrize("agent", [None, CAM])
async def test_a_token_is_found_by_its_secret(store: IdentityStore, agent: AgentId | None) -> None:
    token = replace(TOKEN, agent=agent)
    await store.run(lambda records: records.save_token(token))

    assert await store.read(lambda records: records.token(token.secret_sha256)) == token
    assert await store.read(lambda records: records.token("dd" * 32)) is None


async def test_saving_a_token_again_replaces_it(store: IdentityStore) -> None:
    used = replace(TOKEN, uses_left=0)
    await store.run(lambda records: records.save_token(TOKEN))

    await store.run(lambda records: records.save_token(used))

    assert await store.read(lambda records: list(records.tokens())) == [used]


async def test_deleting_a_token_says_whether_it_was_there(store: IdentityStore) -> None:
    await store.run(lambda records: records.save_token(TOKEN))

    assert await store.run(lambda records: records.delete_token("t1"))
    assert not await store.run(lambda records: records.delete_token("t1"))


async def test_expired_tokens_are_deleted_and_others_stay(store: IdentityStore) -> None:
    late = replace(TOKEN, id="t2", secret_sha256="ee" * 32, expires_at=NOON + timedelta(hours=3))
    await store.run(lambda records: records.save_token(TOKEN))
    await store.run(lambda records: records.save_token(late))

    await store.run(lambda records: records.delete_tokens_expired(NOON + timedelta(hours=2)))

    assert await store.read(lambda records: list(records.tokens())) == [late]


@pytest.mark.parametrize("previous", [None, PublicKey(b"key zero")])
@pytest.mark.parametrize("ban", [None, Ban(NOON, "stolen, 'ünïcode'")])
async def test_an_identity_comes_back_whole(store: IdentityStore, previous: PublicKey | None, ban: Ban | None) -> None:
    identity = replace(IDENTITY, previous_key=previous, ban=ban)

    await store.run(lambda records: records.save_identity(identity))

    assert await store.read(lambda records: records.identity(CAM)) == identity


async def test_an_identity_is_found_by_its_present_key_only(store: IdentityStore) -> None:
    renewed = replace(IDENTITY, key=PublicKey(b"key two"), previous_key=IDENTITY.key)
    await store.run(lambda records: records.save_identity(IDENTITY))
    await store.run(lambda records: records.save_identity(renewed))

    assert await store.read(lambda records: records.identity_of_key(renewed.key.sha256)) == renewed
    assert await store.read(lambda records: records.identity_of_key(IDENTITY.key.sha256)) is None


async def test_identities_come_by_agent(store: IdentityStore) -> None:
    for name in ("c", "a", "b"):
        identity = replace(IDENTITY, agent=AgentId(name), key=PublicKey(name.encode()))
        await store.run(lambda records, each=identity: records.save_identity(each))  # type: ignore[misc]  # bound now

    assert [each.agent for each in await store.read(lambda records: records.identities())] == ["a", "b", "c"]


async def test_a_use_case_that_raises_leaves_no_trace(store: IdentityStore) -> None:
    def fail(records: IdentityRecords) -> None:
        records.save_token(TOKEN)
        records.save_identity(IDENTITY)
        raise Forbidden("no")

    with pytest.raises(Forbidden):
        await store.run(fail)

    assert await store.read(lambda records: (list(records.tokens()), list(records.identities()))) == ([], [])
