"""Renewal against an enrolment port over real TLS; the weeks pass on a clock that sleeping moves."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from controller.demo.ports import free_port
from core.addresses import Address
from edge_agent.identity.exchange import MAX_BUNDLE_BYTES
from edge_agent.identity.folder import Identity, IdentityFolder
from protos.identity.v1 import identity_pb2 as pb
from tests.support.enrolment import WEEK, FakeAuthority, FakeEnrolment, key_in, pem_of_key, public_bytes, serving
from tests.support.renewal import Keeper, SleptClock


@pytest.fixture(scope="module")
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as disk:
        yield disk


@pytest.fixture
def service() -> FakeEnrolment:
    return FakeEnrolment(FakeAuthority())


@pytest.fixture
async def address(service: FakeEnrolment) -> AsyncIterator[Address]:
    async with serving(service) as address:
        yield address


MakeKeeper = Callable[..., Keeper]


@pytest.fixture
def keeper_of(tmp_path: Path, disk: ThreadPoolExecutor) -> MakeKeeper:
    def make(identity: Identity, *, clock: SleptClock | None = None) -> Keeper:
        return Keeper(tmp_path / "identity", identity, clock=clock or SleptClock(), disk=disk)

    return make


@pytest.fixture
def keeper(keeper_of: MakeKeeper, service: FakeEnrolment, address: Address) -> Keeper:
    return keeper_of(service.identity(address))


async def test_a_certificate_is_renewed_when_half_of_its_life_is_over(keeper: Keeper) -> None:
    first = keeper.renewal.identity
    async with keeper.running():
        second = await keeper.until_changed()
    passed = (keeper.clock.now() - first.not_before) / WEEK
    assert 0.5 < passed < 0.61
    assert keeper.folder.load() == second
    assert keeper.channel.replaced == [second.tls]
    assert second.tls.private_key != first.tls.private_key


async def test_renewal_goes_on_for_ever(keeper: Keeper, service: FakeEnrolment) -> None:
    async with keeper.running():
        for _ in range(3):
            service.begins = keeper.clock.now()
            await keeper.until_changed()
    assert len(service.renewals) == 3


async def test_what_was_before_is_kept_until_the_controller_took_the_new_certificate(keeper: Keeper) -> None:
    first = keeper.renewal.identity
    async with keeper.running():
        await keeper.until_changed()
        assert keeper.folder.earlier() == (first,)
        keeper.channel.state = grpc.ChannelConnectivity.READY
        while keeper.folder.earlier():
            await asyncio.sleep(0.001)


async def test_after_a_lost_reply_the_same_key_is_asked_for_again(keeper: Keeper, service: FakeEnrolment) -> None:
    service.replies_to_lose = 1
    async with keeper.running():
        renewed = await keeper.until_changed()
    first, second = (public_bytes(key_in(request.csr)) for request in service.renewals)
    assert first == second
    assert keeper.folder.load() == renewed
    assert keeper.folder.pending_key() is None


async def test_a_controller_restored_from_a_backup_is_asked_in_the_name_of_the_key_before(
    keeper_of: MakeKeeper, service: FakeEnrolment, address: Address, tmp_path: Path
) -> None:
    before = service.identity(address)
    known = service.last_key
    IdentityFolder(tmp_path / "identity").replace(before)
    keeper = keeper_of(service.identity(address))
    service.last_key, service.previous_key = known, None
    async with keeper.running():
        await keeper.until_changed()
    assert keeper.renewal.status().last_error == ""


async def test_a_refused_agent_says_so_keeps_what_it_has_and_asks_seldom(
    keeper: Keeper, service: FakeEnrolment
) -> None:
    service.banned = True
    first = keeper.renewal.identity
    async with keeper.running():
        await keeper.until_failed("banned")
        while len(service.renewals) < 4:
            await asyncio.sleep(0.001)
        status = keeper.renewal.status()
    assert "enrol it again" in status.last_error
    assert status.retry_at is not None
    assert keeper.folder.load() == first
    assert [delay for delay in keeper.clock.delays_s if delay != 60][:3] == [90, 90, 90]


async def test_a_controller_that_is_away_is_asked_again_until_it_is_back(
    keeper_of: MakeKeeper, service: FakeEnrolment
) -> None:
    port = free_port()
    keeper = keeper_of(service.identity(Address("127.0.0.1", port)))
    keeper.clock.set(keeper.clock.now() + WEEK)
    async with keeper.running():
        await keeper.until_failed(f"127.0.0.1:{port}")
        assert keeper.renewal.status().retry_at is not None
        assert keeper.clock.delays_s[:3] == [0.5, 1.0, 2.0][: len(keeper.clock.delays_s)]


def _for_another_name(credential: pb.Credential) -> None:
    key = FakeAuthority().key.public_key()
    credential.certificate_chain = FakeAuthority().certified(key, "gate-2")


def _without_authorities(credential: pb.Credential) -> None:
    credential.trust_bundle = b""


def _too_large(credential: pb.Credential) -> None:
    credential.trust_bundle = b"x" * (MAX_BUNDLE_BYTES + 1)


def _no_text(credential: pb.Credential) -> None:
    credential.certificate_chain = b"\xff\x00"


def _hostile_site(credential: pb.Credential) -> None:
    credential.site = "a/../b"


@pytest.mark.parametrize("spoil", [_for_another_name, _without_authorities, _too_large, _no_text, _hostile_site])
async def test_a_renewal_that_does_not_hold_changes_nothing(
    keeper: Keeper, service: FakeEnrolment, spoil: Callable[[pb.Credential], None]
) -> None:
    service.spoil = spoil
    first = keeper.renewal.identity
    async with keeper.running():
        await keeper.until_failed("expected")
    assert keeper.folder.load() == first
    assert keeper.channel.replaced == []


async def test_a_key_that_the_controller_will_not_certify_is_given_up(keeper: Keeper, service: FakeEnrolment) -> None:
    keeper.folder.keep_pending(pem_of_key(service.authority.key))
    service.refused_key = public_bytes(service.authority.key.public_key())
    async with keeper.running():
        await keeper.until_failed("certified before")
        await keeper.until_changed()


async def test_a_disk_that_fails_is_reported_and_tried_again(keeper: Keeper, tmp_path: Path) -> None:
    (tmp_path / "identity" / "pending.pem").mkdir()
    async with keeper.running():
        await keeper.until_failed("identity: the disk failed")
        (tmp_path / "identity" / "pending.pem").rmdir()
        await keeper.until_changed()


async def test_pushed_authorities_are_kept_and_used_from_now_on(keeper: Keeper, service: FakeEnrolment) -> None:
    first = keeper.renewal.identity
    both = service.authority.pem + FakeAuthority("next").pem
    async with keeper.running():
        keeper.renewal.apply_trust_bundle(both)
        changed = await keeper.until_changed()
    assert changed.tls == replace(first.tls, trust_bundle=both)
    assert keeper.folder.load() == changed
    assert keeper.channel.replaced == [changed.tls]


@pytest.mark.parametrize(
    ("bundle", "reason"),
    [
        (b"nothing", "expected certificates in PEM"),
        (b"\xff", "expected PEM"),
        (b"", "expected certificates in PEM"),
        (b"x" * (MAX_BUNDLE_BYTES + 1), "at most"),
    ],
)
async def test_pushed_authorities_that_are_none_are_refused_and_the_last_good_stay(
    keeper: Keeper, bundle: bytes, reason: str
) -> None:
    first = keeper.renewal.identity
    async with keeper.running():
        keeper.renewal.apply_trust_bundle(bundle)
        await keeper.until_failed(reason)
    assert keeper.folder.load() == first


async def test_pushed_authorities_by_which_the_controller_is_not_trusted_are_refused(keeper: Keeper) -> None:
    keeper.channel.is_reachable = False
    async with keeper.running():
        keeper.renewal.apply_trust_bundle(FakeAuthority("another").pem)
        await keeper.until_failed("cannot be reached")
    assert keeper.channel.replaced == []


async def test_of_authorities_pushed_in_a_row_the_newest_counts(keeper: Keeper, service: FakeEnrolment) -> None:
    older, newer = (service.authority.pem + FakeAuthority(name).pem for name in ("older", "newer"))
    keeper.renewal.apply_trust_bundle(older)
    keeper.renewal.apply_trust_bundle(newer)
    async with keeper.running():
        assert (await keeper.until_changed()).tls.trust_bundle == newer


async def test_the_authorities_that_are_trusted_already_change_nothing(keeper: Keeper, service: FakeEnrolment) -> None:
    async with keeper.running():
        keeper.renewal.apply_trust_bundle(service.authority.pem)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert keeper.channel.replaced == []


@pytest.mark.parametrize("wrong_by", [timedelta(days=-20000), timedelta(days=20000)])
async def test_by_a_wrong_clock_renewals_do_not_follow_on_each_other(
    keeper_of: MakeKeeper, service: FakeEnrolment, address: Address, wrong_by: timedelta
) -> None:
    clock = SleptClock(datetime.now(UTC) + wrong_by)
    keeper = keeper_of(service.identity(address), clock=clock)
    async with keeper.running():
        if wrong_by > timedelta():
            # By this clock every authority has expired, so nothing that comes can be believed.
            await keeper.until_failed("all have expired")
        else:
            await keeper.until_changed()
            assert "before its certificate begins" in keeper.renewal.status().clock_problem
            first_s = clock.monotonic_s()
            await keeper.until_changed()
            assert clock.monotonic_s() - first_s >= WEEK.total_seconds() / 4


async def test_a_clock_some_weeks_ahead_shows_in_a_new_certificate_that_is_over(
    keeper_of: MakeKeeper, service: FakeEnrolment, address: Address
) -> None:
    keeper = keeper_of(service.identity(address), clock=SleptClock(datetime.now(UTC) + timedelta(days=30)))
    assert keeper.renewal.status().clock_problem == ""
    async with keeper.running():
        await keeper.until_changed()
    assert "after the end of a certificate that is new" in keeper.renewal.status().clock_problem
