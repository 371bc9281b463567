"""The table in front of every kind of call, over real TLS: who may pass passes unchanged, nobody else is heard."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

import grpc
import grpc.aio
import pytest

from controller.api.policy import PolicyInterceptor
from controller.identity.authority import CertificateAuthority, key_pem, new_key, public_key_of
from controller.identity.model import Caller
from core.addresses import Address
from core.errors import Forbidden
from core.grpc_transport import TlsIdentity, open_channel
from core.ids import AgentId, SiteId
from core.spiffe import Peer, Role
from tests.support.mutual_tls import SERVICE, EchoPort

Call: TypeAlias = Callable[[grpc.aio.Channel], Awaitable[bytes]]
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"
TIMEOUT_S = 10.0
DOMAIN = "fleet.test"


@dataclass
class Door:
    """Remembers who came; refuses whom it is told to."""

    refused: str = ""
    callers: list[Caller] = field(default_factory=list)

    def admit(self, caller: Caller) -> None:
        self.callers.append(caller)
        if caller.peer.name == self.refused:
            raise Forbidden("banned")

    def site_of(self, agent: AgentId) -> SiteId | None:
        return None


class Fleet:
    def __init__(self) -> None:
        self._authority = CertificateAuthority.make(trust_domain=DOMAIN, now=datetime.now(UTC))

    def member(self, role: Role, name: str) -> TlsIdentity:
        key = new_key()
        peer = Peer(DOMAIN, role, name)
        made = self._authority.issue(peer, public_key_of(key.public_key()), now=datetime.now(UTC))
        return TlsIdentity(made.pem, key_pem(key), self._authority.certificate_pem)


@dataclass
class Guarded:
    fleet: Fleet
    door: Door
    echo: EchoPort
    address: Address

    async def ask(self, call: Call, role: Role = Role.AGENT, name: str = "cam-1") -> bytes:
        async with open_channel(self.address, self.fleet.member(role, name)) as channel:
            return await asyncio.wait_for(call(channel), TIMEOUT_S)


METHODS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")
POLICY: Mapping[str, frozenset[Role]] = {f"/{SERVICE}/{method}": frozenset({Role.AGENT}) for method in METHODS}


@pytest.fixture
async def guarded() -> AsyncIterator[Guarded]:
    fleet, door, echo = Fleet(), Door(), EchoPort()
    shown = fleet.member(Role.CONTROLLER, "main")
    server = grpc.aio.server(interceptors=[PolicyInterceptor(door, policy=POLICY)])
    forgotten: Handler = grpc.unary_unary_rpc_method_handler(_answer)
    server.add_generic_rpc_handlers(
        (echo.handler(), grpc.method_handlers_generic_handler("test.Unlisted", {"Ask": forgotten}))
    )
    credentials = grpc.ssl_server_credentials(
        [(shown.private_key, shown.certificate_chain)], shown.trust_bundle, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield Guarded(fleet, door, echo, Address("127.0.0.1", port))
    await server.stop(None)


async def _answer(request: bytes, _context: object) -> bytes:
    return request


async def _words() -> AsyncIterator[bytes]:
    for word in (b"a", b"b"):
        yield word


async def _silence() -> AsyncIterator[bytes]:
    """Say nothing: who is refused is refused before the first message."""
    await asyncio.Event().wait()
    yield b""


async def unary_unary(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/UnaryUnary")
    return await call(b"ab")


async def unary_stream(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{SERVICE}/UnaryStream")
    return b"".join([answer async for answer in call(b"ab")])


async def stream_unary(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(f"/{SERVICE}/StreamUnary")
    return await call(_words())


async def stream_stream(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/StreamStream")
    return b"".join([answer async for answer in call(_words())])


async def silent_stream_unary(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(f"/{SERVICE}/StreamUnary")
    return await call(_silence())


async def silent_stream_stream(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/StreamStream")
    return b"".join([answer async for answer in call(_silence())])


async def unlisted(channel: grpc.aio.Channel) -> bytes:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Unlisted/Ask")
    return await call(b"ab")


CALLS = (unary_unary, unary_stream, stream_unary, stream_stream)
REFUSED_CALLS = (unary_unary, unary_stream, silent_stream_unary, silent_stream_stream)


@pytest.mark.parametrize("call", CALLS)
async def test_who_may_call_is_answered_unchanged(guarded: Guarded, call: Call) -> None:
    assert await guarded.ask(call) == b"ab"

    assert [caller.peer.name for caller in guarded.door.callers] == ["cam-1"]


@pytest.mark.parametrize("call", REFUSED_CALLS)
async def test_another_role_is_refused_before_the_servicer_hears_of_it(guarded: Guarded, call: Call) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="expected the role agent, got application") as refusal:
        await guarded.ask(call, Role.APPLICATION)

    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert guarded.echo.callers == []


@pytest.mark.parametrize("call", REFUSED_CALLS)
async def test_who_is_not_admitted_is_refused_before_the_servicer_hears_of_it(guarded: Guarded, call: Call) -> None:
    guarded.door.refused = "cam-1"

    with pytest.raises(grpc.aio.AioRpcError, match="banned") as refusal:
        await guarded.ask(call)

    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert guarded.echo.callers == []


async def test_a_method_that_the_table_forgot_is_refused_to_everybody(guarded: Guarded) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="expected the role nobody") as refusal:
        await guarded.ask(unlisted)

    assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
