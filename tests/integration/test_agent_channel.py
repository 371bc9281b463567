"""The channel that follows a renewal, over real mutual TLS: who is seen on the other end, and which calls survive."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from controller.demo.ports import free_port
from core.addresses import Address
from core.grpc_transport import TlsIdentity
from edge_agent.identity.channel import RotatingChannel
from tests.support.enrolment import FakeAuthority, FakeEnrolment
from tests.support.mutual_tls import SERVICE, EchoPort, mutual_port

AUTHORITY = FakeAuthority()
NOWHERE = Address("127.0.0.1", 1)
FIRST, SECOND = (FakeEnrolment(AUTHORITY).identity(NOWHERE).tls for _ in range(2))


@pytest.fixture
def port() -> EchoPort:
    return EchoPort()


@pytest.fixture
async def address(port: EchoPort) -> AsyncIterator[Address]:
    async with mutual_port(AUTHORITY.controller(), port.handler()) as address:
        yield address


@pytest.fixture
async def channel(address: Address) -> AsyncIterator[RotatingChannel]:
    async with RotatingChannel(address, FIRST, grace_s=0.05) as channel:
        yield channel


@pytest.fixture
async def patient(address: Address) -> AsyncIterator[RotatingChannel]:
    async with RotatingChannel(address, FIRST, grace_s=60) as channel:
        yield channel


def methods_of(channel: grpc.aio.Channel) -> dict[str, Any]:
    """Return one method of each kind, as generated stubs make them."""
    return {
        "unary_unary": channel.unary_unary(f"/{SERVICE}/UnaryUnary"),
        "unary_stream": channel.unary_stream(f"/{SERVICE}/UnaryStream"),
        "stream_unary": channel.stream_unary(f"/{SERVICE}/StreamUnary"),
        "stream_stream": channel.stream_stream(f"/{SERVICE}/StreamStream"),
    }


async def ask(kind: str, method: Any) -> bytes:
    if kind == "unary_unary":
        return bytes(await method(b"x", timeout=5))
    if kind == "stream_unary":
        return bytes(await method(iter([b"x"]), timeout=5))
    call = method(b"x", timeout=5) if kind == "unary_stream" else method(iter([b"x"]), timeout=5)
    return b"".join([part async for part in call])


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_a_stub_made_before_shows_the_new_certificate_afterwards(
    port: EchoPort, channel: RotatingChannel, kind: str
) -> None:
    method = methods_of(channel)[kind]
    assert await ask(kind, method) == b"x"
    channel.replace(SECOND)
    assert await ask(kind, method) == b"x"
    assert port.callers == [FIRST.certificate_chain, SECOND.certificate_chain]


async def test_a_call_under_way_ends_on_the_connection_that_it_began_on(
    port: EchoPort, patient: RotatingChannel
) -> None:
    method = patient.unary_unary(f"/{SERVICE}/UnaryUnary")
    call = method(b"wait", timeout=20)
    async with asyncio.timeout(5):
        await port.called.wait()
    patient.replace(SECOND)
    assert await method(b"x", timeout=5) == b"x"
    port.released.set()
    assert await call == b"wait"
    assert port.callers == [FIRST.certificate_chain, SECOND.certificate_chain]


async def test_an_answer_that_is_awaited_is_not_cut_off_by_the_grace(port: EchoPort, channel: RotatingChannel) -> None:
    call = channel.unary_unary(f"/{SERVICE}/UnaryUnary")(b"wait", timeout=20)
    async with asyncio.timeout(5):
        await port.called.wait()
    channel.replace(SECOND)
    await asyncio.sleep(0.2)
    port.released.set()
    assert await call == b"wait"


async def test_a_stream_that_does_not_end_is_ended_after_the_grace(port: EchoPort, channel: RotatingChannel) -> None:
    stream = channel.stream_stream(f"/{SERVICE}/StreamStream")()
    await stream.write(b"x")
    assert await stream.read() == b"x"
    channel.replace(SECOND)
    async with asyncio.timeout(5):
        await port.stream_ended.wait()
    assert stream.cancelled()


async def test_a_stream_on_a_replaced_connection_goes_on_until_then(port: EchoPort, patient: RotatingChannel) -> None:
    stream = patient.stream_stream(f"/{SERVICE}/StreamStream")()
    await stream.write(b"x")
    assert await stream.read() == b"x"
    patient.replace(SECOND)
    await stream.write(b"y")
    assert await stream.read() == b"y"


async def test_closing_ends_replaced_connections_at_once(port: EchoPort, patient: RotatingChannel) -> None:
    stream = patient.stream_stream(f"/{SERVICE}/StreamStream")()
    await stream.write(b"x")
    assert await stream.read() == b"x"
    patient.replace(SECOND)
    await patient.close()
    async with asyncio.timeout(5):
        await port.stream_ended.wait()


async def test_whether_an_identity_reaches_the_controller_is_told_before_it_is_used(channel: RotatingChannel) -> None:
    assert await channel.reaches_with(SECOND, timeout_s=5)
    distrustful = TlsIdentity(SECOND.certificate_chain, SECOND.private_key, FakeAuthority("another").pem)
    assert not await channel.reaches_with(distrustful, timeout_s=0.5)
    stranger = FakeEnrolment(FakeAuthority("another")).identity(NOWHERE).tls
    uncertified = TlsIdentity(stranger.certificate_chain, stranger.private_key, AUTHORITY.pem)
    assert not await channel.reaches_with(uncertified, timeout_s=0.5)


async def test_nothing_is_reached_where_nobody_listens() -> None:
    async with RotatingChannel(Address("127.0.0.1", free_port()), FIRST) as channel:
        assert not await channel.reaches_with(SECOND, timeout_s=0.2)


async def test_a_stub_that_is_gone_is_not_kept(channel: RotatingChannel) -> None:
    for _ in range(100):
        channel.unary_unary(f"/{SERVICE}/UnaryUnary")
    assert len(channel._methods) == 0
