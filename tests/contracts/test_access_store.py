"""What every store of access promises; run on each of them."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from controller.access.model import BrowserSession, Operator, OperatorRole
from controller.access.store import AccessStore
from controller.storage.access import SqlAccessStore
from core.errors import Conflict, NotFound, Unauthenticated
from tests.support.access_store import MemoryAccessStore
from tests.support.databases import SQL_KINDS, migrated_database
from tests.support.fleet_values import NOON

ADA = Operator("ada", OperatorRole.ADMIN, "a" * 64, NOON)
BOB = Operator("bob", OperatorRole.VIEWER, "b" * 64, NOON)


@pytest.fixture(params=["memory", *SQL_KINDS])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AccessStore]:
    if request.param == "memory":
        yield MemoryAccessStore()
        return
    async with migrated_database(request, tmp_path) as database:
        yield SqlAccessStore(database)


def made_session(operator: Operator = ADA, *, mark: str = "0", after_s: float = 0.0) -> BrowserSession:
    began = NOON + timedelta(seconds=after_s)
    return BrowserSession(mark * 64, operator.name, f"csrf-{mark}", began, began + timedelta(hours=1))


async def add(store: AccessStore, session: BrowserSession, *, keep: int = 4) -> None:
    secrets = {operator.name: operator.secret_sha256 for operator in (ADA, BOB)}
    await store.add_session(session, secret_sha256=secrets[session.operator], keep=keep)


async def test_operators_come_back_whole_by_name(store: AccessStore) -> None:
    await store.add_operator(BOB)
    await store.add_operator(ADA)

    assert await store.operators() == [ADA, BOB]


async def test_a_name_is_taken_once(store: AccessStore) -> None:
    await store.add_operator(ADA)
    with pytest.raises(Conflict):
        await store.add_operator(replace(BOB, name="ada"))

    assert await store.operators() == [ADA]


async def test_another_secret_replaces_the_old_one_and_ends_the_sessions(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await add(store, made_session())

    changed = await store.replace_secret("ada", "c" * 64)

    assert changed == replace(ADA, secret_sha256="c" * 64)
    assert await store.operators() == [changed]
    assert await store.session(made_session().token_sha256) is None


async def test_nobody_can_be_removed_or_given_a_secret_who_is_not_there(store: AccessStore) -> None:
    with pytest.raises(NotFound):
        await store.replace_secret("eve", "c" * 64)
    with pytest.raises(NotFound):
        await store.remove_operator("eve")


async def test_the_last_admin_stays(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await store.add_operator(BOB)
    with pytest.raises(Conflict, match="last"):
        await store.remove_operator("ada")

    await store.remove_operator("bob")
    assert await store.operators() == [ADA]


async def test_an_admin_goes_when_another_remains(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await store.add_operator(replace(BOB, role=OperatorRole.ADMIN))

    await store.remove_operator("ada")

    assert [operator.name for operator in await store.operators()] == ["bob"]


async def test_sessions_go_with_their_operator(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await store.add_operator(BOB)
    await add(store, made_session(BOB))

    await store.remove_operator("bob")

    assert await store.session(made_session().token_sha256) is None


async def test_a_session_comes_back_whole_with_its_operator(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await add(store, made_session())

    assert await store.session(made_session().token_sha256) == (made_session(), ADA)
    assert await store.session("f" * 64) is None


async def test_a_session_needs_an_operator(store: AccessStore) -> None:
    with pytest.raises(Unauthenticated):
        await add(store, made_session())


async def test_a_session_is_not_opened_by_a_secret_that_was_replaced(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await store.replace_secret("ada", "c" * 64)
    with pytest.raises(Unauthenticated):
        await add(store, made_session())

    assert await store.session(made_session().token_sha256) is None


async def test_only_the_newest_sessions_of_an_operator_stay(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await store.add_operator(BOB)
    await add(store, made_session(BOB, mark="b"), keep=2)
    for kth in range(3):
        await add(store, made_session(mark=str(kth), after_s=kth), keep=2)

    stay = [mark for mark in "b012" if await store.session(mark * 64) is not None]
    assert stay == ["b", "1", "2"]


async def test_the_end_of_a_session_moves(store: AccessStore) -> None:
    await store.add_operator(ADA)
    session = made_session()
    await add(store, session)
    later = session.expires_at + timedelta(minutes=30)

    await store.extend_session(session.token_sha256, expires_at=later)
    await store.extend_session("f" * 64, expires_at=later)

    assert await store.session(session.token_sha256) == (replace(session, expires_at=later), ADA)


async def test_a_session_ends_once_and_again_without_complaint(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await add(store, made_session())

    for _ in range(2):
        await store.remove_session(made_session().token_sha256)

    assert await store.session(made_session().token_sha256) is None


async def test_what_has_expired_is_removed_and_counted(store: AccessStore) -> None:
    await store.add_operator(ADA)
    await add(store, made_session(mark="1"))
    await add(store, made_session(mark="2", after_s=60.0))

    assert await store.remove_expired_sessions(now=NOON + timedelta(hours=1, seconds=30)) == 1
    assert await store.session("1" * 64) is None
    assert await store.session("2" * 64) is not None
