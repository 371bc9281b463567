"""Identity without sockets: nonces, what a restored database means, rotation by the clock, bounds."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from controller.identity.authorities import PREPARED_FOR
from controller.identity.authority import AUTHORITY_LIFETIME, BACKDATED, new_key, public_key_of
from controller.identity.keys import AuthorityKeys
from controller.identity.model import AUTHORITY_OVERLAP, LIFETIMES, AuthorityState, Caller, Credential
from controller.identity.renewal import NONCE_LIFETIME_S, RenewalNonces, signed_message
from controller.identity.service import MAX_REASON_CHARS, MAX_TOKEN_LIFETIME, Identity
from controller.identity.store import IdentityRecords
from core.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    Unauthenticated,
    Unavailable,
    UnknownAgent,
    Untrusted,
)
from core.ids import AgentId
from core.spiffe import Peer, Role
from tests.support.fleet_values import CAM, NORTH, HeldClock
from tests.support.identity_store import MemoryIdentityStore
from tests.support.trusted_controller import DOMAIN, made_csr

T = TypeVar("T")
Key = ec.EllipticCurvePrivateKey


class StallingStore(MemoryIdentityStore):
    """While `stalled`, a use case is kept and its caller waits on."""

    def __init__(self) -> None:
        super().__init__()
        self.stalled = False
        self.kept = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def run(self, use_case: Callable[[IdentityRecords], T]) -> T:
        result = await super().run(use_case)
        self.kept.set()
        if self.stalled:
            await self.goes_on.wait()
        return result


@dataclass
class Side:
    identity: Identity
    store: StallingStore
    clock: HeldClock
    folder: Path

    async def enrol(self, key: Key, agent: AgentId = CAM) -> Credential:
        made = await self.identity.create_token(NORTH, created_by="ada", agent=agent)
        return await self.identity.enrol(made.secret, made_csr(key), "")

    async def renew(self, key: Key, new: Key, agent: AgentId = CAM) -> Credential:
        nonce, csr = self.identity.challenge(agent), made_csr(new)
        signature = key.sign(signed_message(nonce, csr), ec.ECDSA(hashes.SHA256()))
        return await self.identity.renew(agent, nonce=nonce, csr=csr, signature=signature)

    async def restarted(self) -> Identity:
        identity = Identity(self.store, AuthorityKeys(self.folder), clock=self.clock, trust_domain=DOMAIN)
        await identity.prepare()
        return identity


@pytest.fixture
async def side(tmp_path: Path) -> Side:
    store, clock = StallingStore(), HeldClock()
    identity = Identity(store, AuthorityKeys(tmp_path), clock=clock, trust_domain=DOMAIN)
    await identity.prepare()
    return Side(identity, store, clock, tmp_path)


def caller(key: Key, credential: Credential) -> Caller:
    certificate = x509.load_pem_x509_certificate(credential.certificate_chain)
    return Caller(
        Peer(DOMAIN, Role.AGENT, credential.identity.agent),
        public_key_of(key.public_key()),
        f"{certificate.serial_number:x}",
        certificate.not_valid_before_utc + BACKDATED,
        certificate.not_valid_after_utc,
    )


async def test_the_trust_domain_of_a_fleet_cannot_be_changed(side: Side) -> None:
    moved = Identity(side.store, AuthorityKeys(side.folder), clock=side.clock, trust_domain="other.test")

    with pytest.raises(Conflict, match=f"trust_domain: expected {DOMAIN}.*got other.test; set it back"):
        await moved.prepare()


# ---- admission ------------------------------------------------------------------------------------------------


async def test_a_restart_knows_everybody(side: Side) -> None:
    key = new_key()
    credential = await side.enrol(key)

    identity = await side.restarted()

    identity.admit(caller(key, credential))
    assert identity.site_of(CAM) == NORTH
    assert identity.authority_sha256() == side.identity.authority_sha256()


async def test_a_certificate_newer_than_a_restored_database_counts_and_is_recorded(side: Side) -> None:
    first, second = new_key(), new_key()
    await side.enrol(first)
    backup = await side.identity.identity(CAM)
    side.clock.advance(3600)
    credential = await side.renew(first, second)
    await side.store.run(lambda records: records.save_identity(backup))
    restored = await side.restarted()

    restored.admit(caller(second, credential))
    await restored.tidy()

    assert (await restored.identity(CAM)).key == public_key_of(second.public_key())


async def test_a_ban_holds_for_a_certificate_newer_than_the_database(side: Side) -> None:
    first, second = new_key(), new_key()
    await side.enrol(first)
    side.clock.advance(3600)
    credential = await side.renew(first, second)
    await side.identity.ban(CAM, reason="stolen")

    with pytest.raises(Forbidden, match="stolen"):
        side.identity.admit(caller(second, credential))


async def test_a_certificate_of_another_trust_domain_is_untrusted(side: Side) -> None:
    key = new_key()
    shown = caller(key, await side.enrol(key))

    with pytest.raises(Untrusted):
        side.identity.admit(replace(shown, peer=Peer("other.test", Role.AGENT, CAM)))


async def test_a_connection_does_not_outlive_its_certificate(side: Side) -> None:
    key = new_key()
    shown = caller(key, await side.enrol(key))
    side.clock.advance(LIFETIMES[Role.AGENT].total_seconds() - 1)
    side.identity.admit(shown)

    side.clock.advance(2)

    with pytest.raises(Unauthenticated, match="renew"):
        side.identity.admit(shown)


async def test_a_ban_counts_although_the_operator_hung_up(side: Side) -> None:
    key = new_key()
    credential = await side.enrol(key)
    side.store.kept.clear()
    side.store.stalled = True
    banning = asyncio.create_task(side.identity.ban(CAM, reason="stolen"))
    await side.store.kept.wait()
    banning.cancel()
    await asyncio.wait([banning])
    revoked = asyncio.Event()
    side.identity.on_revoked(lambda _agent, _reason: revoked.set())

    side.store.goes_on.set()
    await asyncio.wait_for(revoked.wait(), 10)

    with pytest.raises(Forbidden):
        side.identity.admit(caller(key, credential))


async def test_a_lifted_ban_lets_the_last_key_count_again(side: Side) -> None:
    key = new_key()
    credential = await side.enrol(key)
    await side.identity.ban(CAM, reason="by mistake")

    await side.identity.unban(CAM)

    side.identity.admit(caller(key, credential))


async def test_whoever_was_never_enrolled_cannot_be_banned(side: Side) -> None:
    with pytest.raises(UnknownAgent):
        await side.identity.ban(CAM, reason="stolen")


@pytest.mark.parametrize("reason", ["", "x" * (MAX_REASON_CHARS + 1), "two\nlines"])
async def test_a_ban_needs_a_reason_of_one_line(side: Side, reason: str) -> None:
    with pytest.raises(InvalidRequest):
        await side.identity.ban(CAM, reason=reason)


# ---- renewal --------------------------------------------------------------------------------------------------


async def test_a_nonce_is_good_once(side: Side) -> None:
    key, new = new_key(), new_key()
    await side.enrol(key)
    nonce, csr = side.identity.challenge(CAM), made_csr(new)
    signature = key.sign(signed_message(nonce, csr), ec.ECDSA(hashes.SHA256()))
    await side.identity.renew(CAM, nonce=nonce, csr=csr, signature=signature)

    with pytest.raises(Forbidden, match="nonce"):
        await side.identity.renew(CAM, nonce=nonce, csr=csr, signature=signature)


def test_a_nonce_is_good_for_its_agent_and_a_minute() -> None:
    nonces = RenewalNonces()
    nonce = nonces.make(CAM, now_s=100)
    nonces.require_fresh(nonce, CAM, now_s=100 + NONCE_LIFETIME_S)

    with pytest.raises(Forbidden):
        nonces.require_fresh(nonce, AgentId("other"), now_s=100)
    with pytest.raises(Forbidden):
        nonces.require_fresh(nonce, CAM, now_s=101 + NONCE_LIFETIME_S)


async def test_a_renewal_signed_by_another_key_is_refused(side: Side) -> None:
    await side.enrol(new_key())

    with pytest.raises(Forbidden, match="not signed by the key"):
        await side.renew(new_key(), new_key())


async def test_a_signature_for_one_request_is_not_good_for_another(side: Side) -> None:
    key = new_key()
    await side.enrol(key)
    nonce = side.identity.challenge(CAM)
    signature = key.sign(signed_message(nonce, made_csr(new_key())), ec.ECDSA(hashes.SHA256()))

    with pytest.raises(Forbidden):
        await side.identity.renew(CAM, nonce=nonce, csr=made_csr(new_key()), signature=signature)


async def test_the_key_of_one_agent_is_not_certified_for_another(side: Side) -> None:
    key = new_key()
    await side.enrol(key)

    with pytest.raises(InvalidRequest, match="certified before"):
        await side.enrol(key, AgentId("cam-2"))


# ---- tokens ---------------------------------------------------------------------------------------------------


async def test_a_token_for_several_devices_lets_in_as_many(side: Side) -> None:
    made = await side.identity.create_token(NORTH, created_by="ada", uses=2)
    names = [(await side.identity.enrol(made.secret, made_csr(new_key()), "")).identity.agent for _ in range(2)]

    assert len(set(names)) == 2
    with pytest.raises(Forbidden):
        await side.identity.enrol(made.secret, made_csr(new_key()), "")


async def test_a_deleted_token_is_good_for_nothing(side: Side) -> None:
    made = await side.identity.create_token(NORTH, created_by="ada")
    await side.identity.delete_token(made.record.id)

    with pytest.raises(Forbidden):
        await side.identity.enrol(made.secret, made_csr(new_key()), "")
    with pytest.raises(NotFound):
        await side.identity.delete_token(made.record.id)


async def test_expired_tokens_are_forgotten(side: Side) -> None:
    await side.identity.create_token(NORTH, created_by="ada")
    side.clock.advance(3601)

    assert list(await side.identity.tokens()) == []
    await side.identity.tidy()
    assert await side.store.read(lambda records: list(records.tokens())) == []


@pytest.mark.parametrize("lifetime", [timedelta(), -timedelta(hours=1), MAX_TOKEN_LIFETIME + timedelta(seconds=1)])
async def test_a_token_lives_for_a_bounded_time(side: Side, lifetime: timedelta) -> None:
    with pytest.raises(InvalidRequest, match="lifetime"):
        await side.identity.create_token(NORTH, created_by="ada", lifetime=lifetime)


async def test_a_token_that_names_an_agent_is_for_one_use(side: Side) -> None:
    with pytest.raises(InvalidRequest, match="uses"):
        await side.identity.create_token(NORTH, created_by="ada", agent=CAM, uses=2)


# ---- authorities ----------------------------------------------------------------------------------------------


def states(identity: Identity) -> list[AuthorityState]:
    return [each.state for each in identity.authorities()]


async def test_an_authority_is_replaced_in_time_by_itself(side: Side) -> None:
    side.clock.advance((AUTHORITY_LIFETIME / 2).total_seconds() + 1)
    await side.identity.tidy()
    assert states(side.identity) == [AuthorityState.ACTIVE, AuthorityState.NEXT]

    side.clock.advance(PREPARED_FOR.total_seconds() + 1)
    await side.identity.tidy()
    assert states(side.identity) == [AuthorityState.RETIRED, AuthorityState.ACTIVE]

    side.clock.advance(AUTHORITY_OVERLAP.total_seconds() + 1)
    await side.identity.tidy()
    assert states(side.identity) == [AuthorityState.ACTIVE]
    assert len(list(side.folder.iterdir())) == 1


async def test_two_rotations_do_not_overlap(side: Side) -> None:
    await side.identity.rotate()
    await side.identity.rotate()

    with pytest.raises(Conflict, match="still trusted"):
        await side.identity.rotate()


async def test_a_retired_authority_may_be_dropped_before_its_time(side: Side) -> None:
    (stolen,) = side.identity.authorities()
    await side.identity.rotate()
    await side.identity.rotate()
    shown = side.identity.server_identity()

    (left,) = await side.identity.drop_authority(stolen.sha256)

    assert (left.state, stolen.certificate.encode() in side.identity.trust_bundle()) == (AuthorityState.ACTIVE, False)
    assert side.identity.server_identity().certificate_chain != shown.certificate_chain
    assert [file.stem for file in side.folder.iterdir()] == [left.sha256]
    await side.identity.rotate()


@pytest.mark.parametrize("rotations_before", [0, 1, 2])
async def test_whatever_was_there_when_it_was_stolen_can_be_replaced(side: Side, rotations_before: int) -> None:
    for _ in range(rotations_before):
        await side.identity.rotate()
    stolen = {each.sha256: each.state for each in side.identity.authorities()}

    for sha256, state in stolen.items():
        if state is not AuthorityState.ACTIVE:
            await side.identity.drop_authority(sha256)
    await side.identity.rotate()
    left = {each.state: each.sha256 for each in await side.identity.rotate()}
    await side.identity.drop_authority(left[AuthorityState.RETIRED])

    assert [each.sha256 for each in side.identity.authorities()] == [left[AuthorityState.ACTIVE]]
    assert left[AuthorityState.ACTIVE] not in stolen


async def test_the_authority_that_signs_is_not_dropped(side: Side) -> None:
    (signing,) = side.identity.authorities()
    with pytest.raises(Conflict, match="rotate until another does"):
        await side.identity.drop_authority(signing.sha256)
    with pytest.raises(NotFound, match="not trusted here"):
        await side.identity.drop_authority("0" * 64)


async def test_the_servers_own_certificate_is_renewed_at_half_its_life(side: Side) -> None:
    shown = side.identity.server_identity()
    await side.identity.tidy()
    assert side.identity.server_identity() is shown

    side.clock.advance((LIFETIMES[Role.CONTROLLER] / 2).total_seconds() + 1)
    await side.identity.tidy()

    assert side.identity.server_identity().certificate_chain != shown.certificate_chain


async def test_a_lost_authority_key_stops_the_start(side: Side) -> None:
    for file in side.folder.iterdir():
        file.unlink()

    with pytest.raises(Unavailable, match="backup"):
        await side.restarted()


async def test_agents_and_controllers_are_not_certified_by_hand(side: Side) -> None:
    for role in (Role.AGENT, Role.CONTROLLER):
        with pytest.raises(InvalidRequest, match="role"):
            side.identity.certify(role, "x", made_csr(new_key()))

    assert side.identity.certify(Role.APPLICATION, "shop", made_csr(new_key())).pem


# ---- what the audit record is told ----------------------------------------------------------------------------


async def test_what_is_decided_without_an_operator_is_reported(side: Side) -> None:
    reported: list[tuple[str, str]] = []
    side.identity.on_decided(lambda action, target, _detail: reported.append((action, target)))
    await side.enrol(new_key())
    first = side.identity.authorities()[0].sha256
    side.clock.advance((AUTHORITY_LIFETIME / 2).total_seconds() + 1)
    await side.identity.tidy()
    second = side.identity.authorities()[1].sha256
    side.clock.advance(PREPARED_FOR.total_seconds() + 1)
    await side.identity.tidy()

    assert reported == [("agent.enrol", CAM), ("authority.prepare", first), ("authority.activate", second)]


async def test_what_an_operator_rotates_is_not_reported_as_our_own_decision(side: Side) -> None:
    reported: list[str] = []
    side.identity.on_decided(lambda action, _target, _detail: reported.append(action))
    await side.identity.rotate()

    assert reported == []
