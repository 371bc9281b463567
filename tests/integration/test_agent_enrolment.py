"""`enrol` against an enrolment port over real TLS: what it sends, to whom, and what it believes."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from controller.demo.ports import free_port
from core.addresses import Address
from core.enrolment_token import EnrolmentToken
from core.errors import (
    Conflict,
    Forbidden,
    IntegrityError,
    InvalidName,
    InvalidRequest,
    NanofleetError,
    Unavailable,
    Untrusted,
)
from edge_agent.identity.enrol import enrol
from edge_agent.identity.folder import Identity, IdentityFolder, NotEnrolled
from protos.identity.v1 import identity_pb2 as pb
from tests.support.enrolment import (
    ROOT,
    FakeAuthority,
    FakeEnrolment,
    key_in,
    pem_of_key,
    public_bytes,
    serving,
    token_for,
)


class Machine:
    """A machine that wants to be an agent."""

    def __init__(self, root: Path) -> None:
        self.folder = IdentityFolder(root / "identity")
        self.root_file = root / "trust" / "root.json"

    async def enrol(self, token: EnrolmentToken, *, wanted_id: str | None = None, force: bool = False) -> Identity:
        """Enrol in a thread, as the command does it without a loop."""
        return await asyncio.to_thread(
            enrol, token, self.folder, root_file=self.root_file, wanted_id=wanted_id, force=force
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "state")


@pytest.fixture
def service() -> FakeEnrolment:
    return FakeEnrolment(FakeAuthority())


@pytest.fixture
async def address(service: FakeEnrolment) -> AsyncIterator[Address]:
    async with serving(service) as address:
        yield address


async def test_a_token_becomes_an_identity_on_disk(machine: Machine, service: FakeEnrolment, address: Address) -> None:
    made = await machine.enrol(token_for(address, service.authority), wanted_id="gate-7")
    assert machine.folder.load() == made
    assert (made.agent_id, made.site, made.enrolment) == ("gate-7", "berlin", address)
    assert made.tls.trust_bundle == service.authority.pem
    assert machine.root_file.read_bytes() == ROOT


async def test_the_private_key_never_leaves_and_nobody_else_can_read_it(
    machine: Machine, service: FakeEnrolment, address: Address, tmp_path: Path
) -> None:
    made = await machine.enrol(token_for(address, service.authority))
    assert made.tls.private_key not in service.requests[0].SerializeToString()
    (key,) = tmp_path.rglob("key.pem")
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state" / "identity").stat().st_mode & 0o777 == 0o700
    assert "PRIVATE KEY" not in repr(made)


async def test_the_secret_is_not_sent_to_a_controller_of_another_authority(
    machine: Machine, service: FakeEnrolment, address: Address
) -> None:
    with pytest.raises(Untrusted, match="nothing was sent"):
        await machine.enrol(token_for(address, FakeAuthority("another")))
    assert service.requests == []


async def test_the_secret_is_not_sent_to_who_shows_the_authority_but_is_not_certified_by_it(machine: Machine) -> None:
    authority, other = FakeAuthority(), FakeAuthority("another")
    impostor = other.controller()
    leaf = impostor.certificate_chain.removesuffix(other.pem)
    service = FakeEnrolment(authority)
    async with serving(service, replace(impostor, certificate_chain=leaf + authority.pem)) as address:
        with pytest.raises(Untrusted, match="expected the fleet's controller"):
            await machine.enrol(token_for(address, authority))
    assert service.requests == []


async def test_the_secret_is_not_sent_to_another_server_of_the_same_authority(machine: Machine) -> None:
    service = FakeEnrolment(FakeAuthority())
    async with serving(service, service.authority.controller(dns="device.nanofleet.internal")) as address:
        with pytest.raises(Untrusted, match="expected the fleet's controller"):
            await machine.enrol(token_for(address, service.authority))
    assert service.requests == []


def _for_another_key(credential: pb.Credential) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    credential.certificate_chain = FakeAuthority().certified(key, credential.agent_id)


def _for_another_name(credential: pb.Credential) -> None:
    credential.agent_id = "gate-2"


def _without_the_authority(credential: pb.Credential) -> None:
    credential.trust_bundle = FakeAuthority("another").pem


def _not_pem(credential: pb.Credential) -> None:
    credential.certificate_chain = b"\xff\x00 nothing"


def _hostile_name(credential: pb.Credential) -> None:
    credential.agent_id = "../../etc"


@pytest.mark.parametrize(
    "spoil", [_for_another_key, _for_another_name, _without_the_authority, _not_pem, _hostile_name]
)
async def test_a_certificate_that_does_not_fit_is_refused_and_nothing_is_kept(
    machine: Machine, service: FakeEnrolment, address: Address, spoil: "object"
) -> None:
    service.spoil = spoil  # type: ignore[assignment]  # as parametrised
    with pytest.raises((Untrusted, InvalidName)):
        await machine.enrol(token_for(address, service.authority))
    with pytest.raises(NotEnrolled, match="enrol TOKEN"):
        machine.folder.load()
    assert not machine.root_file.exists()


async def test_a_catalogue_that_starts_elsewhere_than_the_token_says_is_refused(
    machine: Machine, service: FakeEnrolment, address: Address
) -> None:
    with pytest.raises(Untrusted, match="root that the token names"):
        await machine.enrol(token_for(address, service.authority, root=b"another"))
    assert not machine.root_file.exists()


async def test_after_a_lost_reply_the_same_key_is_sent_again(
    machine: Machine, service: FakeEnrolment, address: Address
) -> None:
    service.replies_to_lose = 1
    token = token_for(address, service.authority)
    with pytest.raises(Unavailable, match="lost"):
        await machine.enrol(token)
    await machine.enrol(token)
    first, second = (public_bytes(key_in(request.csr)) for request in service.requests)
    assert first == second
    assert machine.folder.pending_key() is None


async def test_a_refused_token_is_told_with_the_remedy(
    machine: Machine, service: FakeEnrolment, address: Address
) -> None:
    with pytest.raises(Forbidden, match="nanofleet devices token"):
        await machine.enrol(token_for(address, service.authority, secret=bytes(32)))


async def test_an_enrolled_machine_keeps_its_identity_unless_forced(
    machine: Machine, service: FakeEnrolment, address: Address
) -> None:
    token = token_for(address, service.authority)
    await machine.enrol(token, wanted_id="gate-7")
    with pytest.raises(Conflict, match=r"agent gate-7 .* --force"):
        await machine.enrol(token, wanted_id="gate-8")
    assert machine.folder.load().agent_id == "gate-7"
    assert (await machine.enrol(token, wanted_id="gate-8", force=True)).agent_id == "gate-8"
    assert machine.folder.load().agent_id == "gate-8"


async def test_a_damaged_identity_is_replaced_only_when_forced(
    machine: Machine, service: FakeEnrolment, address: Address, tmp_path: Path
) -> None:
    token = token_for(address, service.authority)
    await machine.enrol(token)
    next(tmp_path.rglob("identity.json")).write_bytes(b"{")
    with pytest.raises(IntegrityError, match="--force"):
        await machine.enrol(token)
    made = await machine.enrol(token, force=True)
    assert machine.folder.load() == made


async def test_a_key_that_will_not_be_certified_is_given_up(
    machine: Machine, service: FakeEnrolment, address: Address
) -> None:
    machine.folder.keep_pending(pem_of_key(service.authority.key))
    service.refused_key = public_bytes(service.authority.key.public_key())
    token = token_for(address, service.authority)
    with pytest.raises(InvalidRequest, match="certified before"):
        await machine.enrol(token)
    await machine.enrol(token)


async def test_a_clock_before_the_controllers_certificate_is_named_as_the_cause(machine: Machine) -> None:
    service = FakeEnrolment(FakeAuthority(begins=datetime.now(UTC) + timedelta(days=1)))
    async with serving(service) as address:
        with pytest.raises(Untrusted, match="set the clock"):
            await machine.enrol(token_for(address, service.authority))


async def test_a_controller_that_is_away_or_speaks_no_tls_is_told(machine: Machine) -> None:
    closed = Address("127.0.0.1", free_port())
    with pytest.raises(Unavailable, match="no controller answers"):
        await machine.enrol(token_for(closed, FakeAuthority()))
    plain = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = plain.sockets[0].getsockname()[1]
    with pytest.raises(NanofleetError, match=str(port)):
        await machine.enrol(token_for(Address("127.0.0.1", port), FakeAuthority()))
    plain.close()
    await plain.wait_closed()
