"""The agent's enrolment and renewal against the controller's own port, from the token's text to a session."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from core.clock import SystemClock
from core.enrolment_token import EnrolmentToken, parse_token
from core.errors import Forbidden, Untrusted
from core.fleet_state import AgentHello
from core.ids import AgentId
from edge_agent.identity.child import ask_child
from edge_agent.identity.enrol import enrol
from edge_agent.identity.exchange import Exchange
from edge_agent.identity.folder import Identity, IdentityFolder
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub
from tests.support.fake_agent import FakeAgent
from tests.support.fleet_values import made_hello
from tests.support.trusted_controller import DOMAIN, ROOT, TrustedController, trusted_controller

CAM = AgentId("cam-1")


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[TrustedController]:
    async with trusted_controller(tmp_path / "controller") as made:
        yield made


@dataclass(frozen=True, slots=True)
class Machine:
    """Where an agent keeps who it is."""

    folder: IdentityFolder
    root_file: Path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(IdentityFolder(tmp_path / "agent"), tmp_path / "root.json")


async def token_of(controller: TrustedController, agent: AgentId | None = CAM) -> EnrolmentToken:
    secret = await controller.token(agent)
    return EnrolmentToken(
        secret,
        controller.identity.authority_sha256(),
        hashlib.sha256(ROOT).digest(),
        DOMAIN,
        controller.main_address,
        controller.enrolment.address,
    )


async def enrolled(controller: TrustedController, machine: Machine, *, force: bool = False) -> Identity:
    token = parse_token(str(await token_of(controller)))
    return await asyncio.to_thread(enrol, token, machine.folder, root_file=machine.root_file, force=force)


async def renewed(machine: Machine, present: Identity) -> Identity:
    with ThreadPoolExecutor(1) as disk:
        return await Exchange(machine.folder, disk=disk, child=ask_child, clock=SystemClock()).renew(present)


async def is_served(controller: TrustedController, identity: Identity) -> bool:
    hello: AgentHello = made_hello(identity.agent_id, site=identity.site)
    async with controller.channel(identity.tls) as channel:
        call = FleetServiceStub(channel).Session()
        try:
            await FakeAgent(call).hello(hello)
        finally:
            call.cancel()
    return True


async def test_a_token_in_hand_becomes_a_session(controller: TrustedController, machine: Machine) -> None:
    identity = await enrolled(controller, machine)

    assert (identity.agent_id, identity.site) == (CAM, "north")
    assert await is_served(controller, identity)


async def test_an_agent_renews_and_is_served_with_its_new_key(controller: TrustedController, machine: Machine) -> None:
    first = await enrolled(controller, machine)

    second = await renewed(machine, first)

    assert second.tls.private_key != first.tls.private_key
    assert await is_served(controller, second)


async def test_an_agent_that_was_off_for_weeks_renews(controller: TrustedController, machine: Machine) -> None:
    controller.clock.shift(-timedelta(days=30))
    first = await enrolled(controller, machine)
    controller.clock.shift(timedelta())

    assert await is_served(controller, await renewed(machine, first))


async def test_an_agent_renews_through_a_rotation_that_it_missed(
    controller: TrustedController, machine: Machine
) -> None:
    first = await enrolled(controller, machine)
    await controller.identity.rotate()
    await controller.identity.rotate()

    assert await is_served(controller, await renewed(machine, first))


async def test_a_banned_agent_cannot_renew_and_enrols_anew(controller: TrustedController, machine: Machine) -> None:
    first = await enrolled(controller, machine)
    await controller.identity.ban(CAM, reason="stolen")
    with pytest.raises(Forbidden):
        await renewed(machine, first)

    assert await is_served(controller, await enrolled(controller, machine, force=True))


async def test_a_token_for_another_fleet_is_not_shown_to_this_one(
    controller: TrustedController, machine: Machine
) -> None:
    token = await token_of(controller)
    foreign = EnrolmentToken(token.secret, bytes(32), token.root_sha256, DOMAIN, token.controller, token.enrolment)

    with pytest.raises(Untrusted):
        await asyncio.to_thread(enrol, foreign, machine.folder, root_file=machine.root_file)

    assert (await controller.identity.tokens())[0].uses_left == 1
