"""The director's signatures, checked as an agent checks them: against the catalogue that rides along."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tuf.api.metadata import Metadata

from controller.signing.director import Director
from controller.signing.model import KeyRole
from core.catalogue import DIRECTOR_KEYS
from core.errors import Unavailable, Untrusted
from core.fleet_state import ASSIGNMENT_CONTEXT, AgentHello, DesiredState, Position, SignedAssignment
from core.fleet_wire import decode_desired
from core.ids import AgentId, SiteId
from protos.fleet.v1 import fleet_pb2 as pb
from tests.support.catalogues import METER, START, SignedWorld, made_release

FIRST = made_release(METER, 1)
HELLO = AgentHello(AgentId("cam-1"), SiteId("north"), "0.1.0", "boot-1", Position(0, 0), ())
DESIRED = DesiredState(HELLO.agent_id, Position(1, 4), START, (FIRST.slot,))


@pytest.fixture
async def world(tmp_path: Path) -> SignedWorld:
    world = SignedWorld(tmp_path)
    await world.catalogue.prepare()
    await world.catalogue.release([FIRST])
    return world


@pytest.fixture
def director(world: SignedWorld) -> Director:
    return Director(world.catalogue, clock=world.clock)


def verified(signed: SignedAssignment) -> DesiredState:
    """Return what was signed, if a key signed it that the metadata beside it lists."""
    (targets,) = (file for file in signed.catalogue if file.name.endswith(".targets.json"))
    listed = Metadata.from_bytes(targets.content).signed.unrecognized_fields[DIRECTOR_KEYS]
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(listed[signed.key_id]))
    key.verify(signed.signature, ASSIGNMENT_CONTEXT + signed.payload)
    return decode_desired(pb.DesiredState.FromString(signed.payload))


async def test_an_assignment_is_signed_dated_and_comes_with_what_verifies_it(director: Director) -> None:
    signed = await director.signed(DESIRED, HELLO)

    assert verified(signed) == replace(DESIRED, expires_at=START + timedelta(days=30))
    assert [file.name for file in signed.catalogue] == [
        "1.root.json",
        "timestamp.json",
        "2.snapshot.json",
        "2.targets.json",
        "1.family-meter.json",
    ]


async def test_a_signature_is_good_for_no_other_context(director: Director) -> None:
    signed = await director.signed(DESIRED, HELLO)

    with pytest.raises(InvalidSignature):
        verified(replace(signed, payload=signed.payload + b"\0"))


async def test_an_agent_with_the_newest_catalogue_is_sent_no_more_than_its_families(
    world: SignedWorld, director: Director
) -> None:
    signed = await director.signed(DESIRED, replace(HELLO, catalogue=world.catalogue.versions()))

    assert [file.name for file in signed.catalogue] == ["1.family-meter.json"]


async def test_a_new_director_key_signs_once_the_catalogue_lists_it(world: SignedWorld, director: Director) -> None:
    before = await director.signed(DESIRED, HELLO)

    rotation = await world.catalogue.rotate(KeyRole.DIRECTOR)
    after = await director.signed(DESIRED, HELLO)

    assert (before.key_id, after.key_id) == (rotation.removed, rotation.added)
    assert verified(after).slots == DESIRED.slots


async def test_while_the_new_key_is_only_staged_the_old_one_signs(world: SignedWorld, director: Director) -> None:
    world.move_keys(KeyRole.TARGETS)

    rotation = await world.catalogue.rotate(KeyRole.DIRECTOR)

    assert (await director.signed(DESIRED, HELLO)).key_id == rotation.removed


async def test_without_a_listed_key_nothing_is_signed(world: SignedWorld, director: Director) -> None:
    world.move_keys(KeyRole.DIRECTOR)

    with pytest.raises(Untrusted, match="rotate director"):
        await director.signed(DESIRED, HELLO)


@pytest.fixture
async def reissues(director: Director) -> AsyncIterator[asyncio.Queue[None]]:
    asked: asyncio.Queue[None] = asyncio.Queue()

    async def reissue() -> None:
        asked.put_nowait(None)

    running = asyncio.create_task(director.run(reissue))
    await asyncio.sleep(0)
    yield asked
    running.cancel()


async def test_agents_are_told_again_when_something_is_revoked(
    world: SignedWorld, reissues: asyncio.Queue[None]
) -> None:
    await world.catalogue.revoke(METER, versions=[1])

    async with asyncio.timeout(5):
        await reissues.get()


async def test_agents_are_told_again_by_the_new_director_key(world: SignedWorld, reissues: asyncio.Queue[None]) -> None:
    await world.catalogue.rotate(KeyRole.DIRECTOR)

    async with asyncio.timeout(5):
        await reissues.get()


async def test_agents_are_told_again_when_a_revocation_that_waited_is_published(
    world: SignedWorld, reissues: asyncio.Queue[None]
) -> None:
    elsewhere = world.move_keys(KeyRole.TARGETS)
    await world.catalogue.revoke(METER, versions=[1])
    assert reissues.empty()
    (elsewhere / "targets").rename(world.folder / "keys" / "targets")

    await world.catalogue.renew()

    async with asyncio.timeout(5):
        await reissues.get()


async def test_a_release_by_itself_tells_agents_nothing(world: SignedWorld, reissues: asyncio.Queue[None]) -> None:
    await world.catalogue.release([made_release(METER, 2)])

    assert reissues.empty()


class FailingOnce:
    """The fleet whose database is busy at the first reissue."""

    def __init__(self) -> None:
        self._is_busy = True
        self.reissued = asyncio.Event()

    async def reissue(self) -> None:
        if self._is_busy:
            self._is_busy = False
            raise Unavailable("the database is busy")
        self.reissued.set()


async def test_a_reissue_that_failed_stays_due(world: SignedWorld, director: Director) -> None:
    fleet = FailingOnce()
    async with asyncio.timeout(5):
        await world.catalogue.revoke(METER, versions=[1])
        with pytest.raises(Unavailable):
            await director.run(fleet.reissue)

        # As a supervisor does.
        again = asyncio.create_task(director.run(fleet.reissue))
        await fleet.reissued.wait()
    again.cancel()


async def test_what_is_revoked_while_agents_are_told_is_told_too(world: SignedWorld, director: Director) -> None:
    await world.catalogue.release([made_release(METER, 2)])
    told: asyncio.Queue[None] = asyncio.Queue()

    async def revoke_meanwhile() -> None:
        told.put_nowait(None)
        if told.qsize() == 1:
            await world.catalogue.revoke(METER, versions=[2])

    async with asyncio.timeout(5):
        await world.catalogue.revoke(METER, versions=[1])
        running = asyncio.create_task(director.run(revoke_meanwhile))
        while told.qsize() < 2:
            await asyncio.sleep(0)
    running.cancel()


async def test_agents_are_told_of_a_revocation_whose_end_the_catalogue_did_not_see(
    world: SignedWorld, reissues: asyncio.Queue[None]
) -> None:
    world.memory.lose_next = Unavailable("the connection to the database broke")
    with pytest.raises(Unavailable):
        await world.catalogue.revoke(METER, versions=[1])

    await world.catalogue.release([made_release(METER, 2)])

    async with asyncio.timeout(5):
        await reissues.get()
