"""The agent's identity against the controller's real ports: enrolled, served, renewed, rotated, banned."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from core.enrolment_token import EnrolmentToken, parse_token
from core.ids import AgentId
from edge_agent.identity.channel import RotatingChannel
from edge_agent.identity.enrol import enrol
from edge_agent.identity.folder import Identity, IdentityFolder
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub
from tests.support.fake_agent import FakeAgent
from tests.support.fleet_values import made_hello
from tests.support.renewal import Keeper, SleptClock
from tests.support.trusted_controller import DOMAIN, ROOT, TrustedController, trusted_controller

CAM = AgentId("cam-1")


@pytest.fixture(scope="module")
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as disk:
        yield disk


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[TrustedController]:
    async with trusted_controller(tmp_path / "controller") as made:
        yield made


async def enrolled(controller: TrustedController, folder: Path) -> Identity:
    """Enrol with a token that went through its text, as the operator's command prints it."""
    token = EnrolmentToken(
        await controller.token(CAM),
        controller.identity.authority_sha256(),
        hashlib.sha256(ROOT).digest(),
        DOMAIN,
        controller.main_address,
        controller.enrolment.address,
    )
    machine = IdentityFolder(folder / "identity")
    return await asyncio.to_thread(
        enrol, parse_token(str(token)), machine, root_file=folder / "trust" / "root.json", wanted_id="cam-1"
    )


async def is_served(channel: RotatingChannel) -> bool:
    """Say hello; True when Welcome comes."""
    call = FleetServiceStub(channel).Session()
    await FakeAgent(call).hello(made_hello(CAM))
    call.cancel()
    return True


@asynccontextmanager
async def kept(
    identity: Identity, folder: Path, disk: ThreadPoolExecutor
) -> AsyncIterator[tuple[Keeper, RotatingChannel]]:
    async with RotatingChannel(identity.controller, identity.tls, grace_s=0.0) as channel:
        path = folder / "kept"
        yield Keeper(path, identity, clock=SleptClock(), channel=channel, disk=disk), channel


async def test_an_enrolled_agent_is_served_and_after_its_renewal_too(
    controller: TrustedController, tmp_path: Path, disk: ThreadPoolExecutor
) -> None:
    identity = await enrolled(controller, tmp_path / "agent")
    assert (identity.agent_id, identity.site) == (CAM, "north")
    async with kept(identity, tmp_path, disk) as (keeper, channel):
        assert await is_served(channel)
        async with keeper.running():
            renewed = await keeper.until_changed()
            assert renewed.tls.private_key != identity.tls.private_key
            assert await is_served(channel)


async def test_the_controller_renews_for_a_known_key_after_expiry(
    controller: TrustedController, tmp_path: Path, disk: ThreadPoolExecutor
) -> None:
    controller.clock.shift(by=timedelta(days=-30))
    identity = await enrolled(controller, tmp_path / "agent")
    controller.clock.shift(by=timedelta())
    async with kept(identity, tmp_path, disk) as (keeper, channel), keeper.running():
        await keeper.until_changed()
        assert await is_served(channel)


async def test_the_authorities_pushed_while_they_rotate_are_taken(
    controller: TrustedController, tmp_path: Path, disk: ThreadPoolExecutor
) -> None:
    identity = await enrolled(controller, tmp_path / "agent")
    async with kept(identity, tmp_path, disk) as (keeper, channel):
        await controller.identity.rotate()
        pushed = controller.identity.trust_bundle()
        assert pushed != identity.tls.trust_bundle
        async with keeper.running():
            keeper.renewal.apply_trust_bundle(pushed)
            assert (await keeper.until_changed()).tls.trust_bundle == pushed
            assert await is_served(channel)


async def test_what_a_dropped_authority_certified_is_refused_until_it_is_renewed(
    controller: TrustedController, tmp_path: Path, disk: ThreadPoolExecutor
) -> None:
    identity = await enrolled(controller, tmp_path / "agent")
    stolen = controller.identity.authorities()[0].sha256
    await controller.identity.rotate()
    async with kept(identity, tmp_path, disk) as (keeper, _), keeper.running():
        keeper.renewal.apply_trust_bundle(controller.identity.trust_bundle())
        identity = await keeper.until_changed()
    await controller.identity.rotate()
    await controller.identity.drop_authority(stolen)

    async with kept(identity, tmp_path, disk) as (keeper, channel):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await is_served(channel)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        async with keeper.running():
            await keeper.until_changed()
            assert await is_served(channel)


@pytest.mark.parametrize("steps", [1, 2])
async def test_a_machine_is_enrolled_at_every_step_of_a_rotation(
    controller: TrustedController, tmp_path: Path, disk: ThreadPoolExecutor, steps: int
) -> None:
    for _ in range(steps):
        await controller.identity.rotate()
    identity = await enrolled(controller, tmp_path / "agent")
    async with kept(identity, tmp_path, disk) as (_, channel):
        assert await is_served(channel)


async def test_a_banned_agent_says_why_it_is_refused(
    controller: TrustedController, tmp_path: Path, disk: ThreadPoolExecutor
) -> None:
    identity = await enrolled(controller, tmp_path / "agent")
    await controller.identity.ban(CAM, reason="stolen from the depot")
    async with kept(identity, tmp_path, disk) as (keeper, _), keeper.running():
        await keeper.until_failed("stolen from the depot")
