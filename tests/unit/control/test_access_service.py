"""Operators, their secrets and sessions, on a clock that moves when told to."""

import asyncio
from collections.abc import Sequence

import pytest

from controller.access.attempts import BURST, MAX_SOURCES, REFILL_S, FailedAttempts
from controller.access.model import BrowserSession, Operator, OperatorRole
from controller.access.service import MAX_SESSIONS_PER_OPERATOR, REMEMBER_S, SECRET_PREFIX, Access, SignedIn, sha256_of
from core.errors import Conflict, InvalidName, NotFound, Overloaded, Unauthenticated
from tests.support.access_store import MemoryAccessStore
from tests.support.fleet_values import HeldClock

HOME = "192.0.2.1"
HOUR_S = 3600.0


@pytest.fixture
def clock() -> HeldClock:
    return HeldClock()


@pytest.fixture
def store() -> MemoryAccessStore:
    return MemoryAccessStore()


@pytest.fixture
def access(store: MemoryAccessStore, clock: HeldClock) -> Access:
    return Access(store, clock=clock)


async def signed_in(access: Access, name: str = "ada", role: OperatorRole = OperatorRole.ADMIN) -> SignedIn:
    return await access.sign_in((await access.create(name, role)).secret, source=HOME)


async def is_live(access: Access, done: SignedIn) -> bool:
    try:
        await access.resume(done.token, source=HOME)
    except Unauthenticated:
        return False
    return True


# ---- roles and secrets ------------------------------------------------------------------------------------------


def test_roles_are_in_ascending_order() -> None:
    assert OperatorRole.VIEWER < OperatorRole.OPERATOR < OperatorRole.ADMIN
    assert OperatorRole.ADMIN >= OperatorRole.OPERATOR
    assert max(OperatorRole) is OperatorRole.ADMIN


async def test_a_secret_proves_who_it_was_made_for(access: Access) -> None:
    issued = await access.create("ada", OperatorRole.OPERATOR)

    assert await access.authenticate(issued.secret, source=HOME) == issued.operator


async def test_only_the_hash_of_a_secret_is_kept_and_no_value_shows_it(
    access: Access, store: MemoryAccessStore
) -> None:
    issued = await access.create("ada", OperatorRole.ADMIN)

    assert issued.secret.startswith(SECRET_PREFIX)
    assert len(issued.secret) == len(SECRET_PREFIX) + 43
    assert [operator.secret_sha256 for operator in await store.operators()] == [sha256_of(issued.secret)]
    assert issued.secret not in repr(issued)


@pytest.mark.parametrize("secret", ["", "nfo1.", "nfo1." + "A" * 43, "\udc80", "é" * 5000, "nfo1." + "A" * 10**6])
async def test_what_is_nobodys_secret_is_refused(access: Access, secret: str) -> None:
    await access.create("ada", OperatorRole.ADMIN)
    with pytest.raises(Unauthenticated, match="nanofleet operators add"):
        await access.authenticate(secret, source=HOME)


async def test_a_rotated_secret_ends_at_once(access: Access) -> None:
    old = await access.create("ada", OperatorRole.ADMIN)
    await access.authenticate(old.secret, source=HOME)

    new = await access.rotate("ada")

    assert (await access.authenticate(new.secret, source=HOME)).name == "ada"
    with pytest.raises(Unauthenticated):
        await access.authenticate(old.secret, source=HOME)


async def test_a_removed_operator_ends_at_once(access: Access) -> None:
    await access.create("ada", OperatorRole.ADMIN)
    bob = await access.create("bob", OperatorRole.VIEWER)
    session = await access.sign_in(bob.secret, source=HOME)
    assert await is_live(access, session)

    await access.remove("bob")

    assert not await is_live(access, session)
    with pytest.raises(Unauthenticated):
        await access.authenticate(bob.secret, source=HOME)


async def test_the_last_admin_stays(access: Access) -> None:
    await access.create("ada", OperatorRole.ADMIN)
    with pytest.raises(Conflict):
        await access.remove("ada")


async def test_names_are_checked(access: Access) -> None:
    with pytest.raises(InvalidName):
        await access.create("../ada", OperatorRole.ADMIN)
    with pytest.raises(NotFound):
        await access.rotate("nobody")


async def test_secrets_are_not_looked_up_for_every_request(access: Access, store: MemoryAccessStore) -> None:
    issued = await access.create("ada", OperatorRole.ADMIN)
    for _ in range(5):
        await access.authenticate(issued.secret, source=HOME)

    assert store.lookups == 1


async def test_what_another_process_changed_is_seen_soon(
    access: Access, store: MemoryAccessStore, clock: HeldClock
) -> None:
    issued = await access.create("ada", OperatorRole.ADMIN)
    await access.authenticate(issued.secret, source=HOME)
    await store.replace_secret("ada", "0" * 64)

    clock.advance(REMEMBER_S)

    with pytest.raises(Unauthenticated):
        await access.authenticate(issued.secret, source=HOME)


class HeldStore(MemoryAccessStore):
    """Lets a change happen between reading the operators and handing them out."""

    def __init__(self) -> None:
        super().__init__()
        self.has_read = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def operators(self) -> Sequence[Operator]:
        found = await super().operators()
        self.has_read.set()
        await self.may_go_on.wait()
        return found


async def test_what_was_read_before_a_change_is_not_remembered_after_it(clock: HeldClock) -> None:
    store = HeldStore()
    access = Access(store, clock=clock)
    old = await access.create("ada", OperatorRole.ADMIN)
    asking = asyncio.create_task(access.authenticate(old.secret, source=HOME))
    await store.has_read.wait()
    await access.rotate("ada")
    store.may_go_on.set()
    await asking

    with pytest.raises(Unauthenticated):
        await access.authenticate(old.secret, source=HOME)


# ---- failed attempts --------------------------------------------------------------------------------------------


async def test_a_source_that_fails_too_often_is_told_to_wait(access: Access, clock: HeldClock) -> None:
    for _ in range(BURST):
        with pytest.raises(Unauthenticated):
            await access.authenticate("wrong", source=HOME)
    with pytest.raises(Overloaded, match="too often"):
        await access.authenticate("wrong", source=HOME)
    with pytest.raises(Unauthenticated):
        await access.authenticate("wrong", source="192.0.2.2")

    clock.advance(REFILL_S)

    with pytest.raises(Unauthenticated):
        await access.authenticate("wrong", source=HOME)


async def test_a_good_secret_is_let_in_whatever_its_neighbours_send(access: Access, clock: HeldClock) -> None:
    issued = await access.create("ada", OperatorRole.ADMIN)
    for _ in range(BURST + 1):
        with pytest.raises((Unauthenticated, Overloaded)):
            await access.authenticate("wrong", source=HOME)
    clock.advance(REMEMBER_S - REFILL_S)

    assert (await access.authenticate(issued.secret, source=HOME)).name == "ada"


def test_addresses_of_one_ipv6_network_are_one_source() -> None:
    attempts = FailedAttempts(HeldClock())
    for kth in range(BURST):
        attempts.count(f"2001:db8::{kth:x}")
    with pytest.raises(Overloaded):
        attempts.count("2001:db8::ffff")

    attempts.count("2001:db8:0:1::1")


def test_only_so_many_sources_are_remembered() -> None:
    attempts = FailedAttempts(HeldClock())
    for _ in range(BURST):
        attempts.count("quiet")
    for kth in range(MAX_SOURCES):
        attempts.count(f"source-{kth}")

    attempts.count("quiet")


# ---- browser sessions -------------------------------------------------------------------------------------------


async def test_a_session_stands_for_its_operator(access: Access) -> None:
    done = await signed_in(access)
    caller = await access.resume(done.token, source=HOME)

    assert caller.operator.name == "ada"
    assert caller.session == done.session
    assert done.token not in repr(done)


async def test_a_token_is_no_secret_and_a_secret_is_no_token(access: Access) -> None:
    issued = await access.create("ada", OperatorRole.ADMIN)
    done = await access.sign_in(issued.secret, source=HOME)
    await access.resume(done.token, source=HOME)

    with pytest.raises(Unauthenticated):
        await access.authenticate(done.token, source=HOME)
    with pytest.raises(Unauthenticated):
        await access.resume(issued.secret, source=HOME)


async def test_a_session_ends_an_hour_after_its_last_use(access: Access, clock: HeldClock) -> None:
    done = await signed_in(access)
    clock.advance(HOUR_S / 2)
    assert await is_live(access, done)
    clock.advance(HOUR_S - 1)
    assert await is_live(access, done)

    clock.advance(HOUR_S)

    assert not await is_live(access, done)


async def test_a_session_ends_after_twelve_hours_whatever_its_use(access: Access, clock: HeldClock) -> None:
    done = await signed_in(access)
    for _ in range(23):
        clock.advance(HOUR_S / 2)
        assert await is_live(access, done)

    clock.advance(HOUR_S / 2)

    assert not await is_live(access, done)


async def test_a_session_in_use_is_seldom_looked_up(access: Access, store: MemoryAccessStore) -> None:
    done = await signed_in(access)
    lookups = store.lookups
    for _ in range(5):
        await access.resume(done.token, source=HOME)

    assert store.lookups == lookups + 1


async def test_signing_out_ends_the_session_at_once(access: Access) -> None:
    done = await signed_in(access)
    assert await is_live(access, done)

    await access.sign_out(done.session)

    assert not await is_live(access, done)


async def test_another_secret_ends_the_sessions_of_the_old_one(access: Access) -> None:
    done = await signed_in(access)
    assert await is_live(access, done)

    await access.rotate("ada")

    assert not await is_live(access, done)


class RotatingStore(MemoryAccessStore):
    """Another secret is set just before a session is added, as when two requests meet."""

    async def add_session(self, session: BrowserSession, *, secret_sha256: str, keep: int) -> None:
        await self.replace_secret(session.operator, "0" * 64)
        await super().add_session(session, secret_sha256=secret_sha256, keep=keep)


async def test_a_stolen_secret_does_not_slip_in_behind_its_replacement(clock: HeldClock) -> None:
    access = Access(RotatingStore(), clock=clock)
    stolen = (await access.create("ada", OperatorRole.ADMIN)).secret
    with pytest.raises(Unauthenticated):
        await access.sign_in(stolen, source=HOME)


async def test_the_oldest_session_of_an_operator_makes_room(access: Access, clock: HeldClock) -> None:
    issued = await access.create("ada", OperatorRole.ADMIN)
    sessions = []
    for _ in range(MAX_SESSIONS_PER_OPERATOR + 1):
        sessions.append(await access.sign_in(issued.secret, source=HOME))
        clock.advance(1)

    assert [await is_live(access, done) for done in sessions[:2]] == [False, True]


async def test_expired_sessions_are_swept(access: Access, store: MemoryAccessStore, clock: HeldClock) -> None:
    done = await signed_in(access)
    clock.advance(2 * HOUR_S)
    sweeping = asyncio.create_task(access.run())
    await asyncio.sleep(0)
    sweeping.cancel()
    await asyncio.wait([sweeping])

    assert await store.session(done.session.token_sha256) is None
