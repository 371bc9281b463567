"""The agent's half of the identity faults: I07, I12 and D04's transport, with the real child process and real TLS."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from controller.demo.ports import free_port
from core.addresses import Address
from core.clock import SystemClock
from core.errors import Untrusted
from core.fleet_state import AgentHello, Position
from core.ids import AgentId, SiteId
from core.open_inference.service import Call
from core.telemetry import Tracing
from edge_agent.cascade.offload import Offload
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.identity.channel import RotatingChannel
from edge_agent.identity.child import ask_child
from edge_agent.identity.enrol import enrol
from edge_agent.identity.folder import Identity, IdentityFolder
from edge_agent.link.reconnect import Link, ReconnectPolicy
from edge_agent.link.session import Session, SessionLimits, SessionState
from edge_agent.runtime.pool import ModelPool
from edge_agent.settings import OffloadSettings, RuntimeSettings
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub
from tests.support.edge_plane import UNSAMPLED, UNSURE, cascade_of, echo_model, request_of
from tests.support.enrolment import FakeAuthority, FakeEnrolment, serving, token_for
from tests.support.mutual_tls import SERVICE, EchoPort, mutual_port
from tests.support.renewal import Keeper, SleptClock

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EXPIRED = timedelta(minutes=30)


@pytest.fixture(scope="module")
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as disk:
        yield disk


@pytest.fixture
def service() -> FakeEnrolment:
    return FakeEnrolment(FakeAuthority())


@pytest.fixture
async def enrolment(service: FakeEnrolment) -> AsyncIterator[Address]:
    async with serving(service) as address:
        yield address


@pytest.fixture
async def controller(service: FakeEnrolment) -> AsyncIterator[Address]:
    async with mutual_port(service.authority.controller(), EchoPort().handler()) as address:
        yield address


async def code_of_asking(channel: grpc.aio.Channel) -> grpc.StatusCode:
    try:
        await channel.unary_unary(f"/{SERVICE}/UnaryUnary", bytes, bytes)(b"x", timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


MakeKeeper = Callable[[Identity, RotatingChannel, SleptClock], Keeper]


@pytest.fixture
def keeper_of(tmp_path: Path, disk: ThreadPoolExecutor) -> MakeKeeper:
    def make(identity: Identity, channel: RotatingChannel, clock: SleptClock) -> Keeper:
        return Keeper(tmp_path / "identity", identity, clock=clock, channel=channel, child=ask_child, disk=disk)

    return make


async def test_I07_a_certificate_that_expired_while_offline_is_renewed_by_the_known_key(
    service: FakeEnrolment, enrolment: Address, controller: Address, keeper_of: MakeKeeper
) -> None:
    expired = service.identity(enrolment, controller=controller, life=EXPIRED)
    async with RotatingChannel(controller, expired.tls, grace_s=0.0) as channel:
        assert await code_of_asking(channel) is grpc.StatusCode.UNAVAILABLE
        keeper = keeper_of(expired, channel, SleptClock())
        async with keeper.running():
            renewed = await keeper.until_changed()
            assert await code_of_asking(channel) is grpc.StatusCode.OK
            while keeper.folder.earlier():
                await asyncio.sleep(0.01)
    assert renewed.not_after > datetime.now(UTC)
    assert keeper.folder.load() == renewed


async def test_I07_an_agent_that_comes_too_late_says_that_it_must_be_enrolled_again(
    service: FakeEnrolment, enrolment: Address, controller: Address, keeper_of: MakeKeeper
) -> None:
    expired = service.identity(enrolment, controller=controller, life=EXPIRED)
    service.banned = True
    async with RotatingChannel(controller, expired.tls, grace_s=0.0) as channel:
        keeper = keeper_of(expired, channel, SleptClock())
        async with keeper.running():
            await keeper.until_failed("enrol it again with --force")
    assert keeper.folder.load() == expired


async def test_I12_an_agent_that_starts_in_1970_says_so_and_goes_on(
    service: FakeEnrolment, enrolment: Address, controller: Address, keeper_of: MakeKeeper
) -> None:
    expired = service.identity(enrolment, controller=controller, life=EXPIRED)
    clock = SleptClock(EPOCH)
    async with RotatingChannel(controller, expired.tls, grace_s=0.0) as channel:
        keeper = keeper_of(expired, channel, clock)
        assert keeper.renewal.status().clock_problem.startswith("this machine's clock says 1970-01-01 00:00 UTC")
        async with keeper.running():
            await keeper.until_changed()
            assert await code_of_asking(channel) is grpc.StatusCode.OK
        clock.set(datetime.now(UTC))
        assert keeper.renewal.status().clock_problem == ""


async def test_I12_when_certificates_have_not_begun_attempts_go_on_until_the_clock_is_right(
    service: FakeEnrolment, controller: Address, keeper_of: MakeKeeper
) -> None:
    # For TLS, which asks the system's clock, a controller certified for tomorrow is the same as a clock of yesterday.
    tomorrow = service.authority.controller(begins=datetime.now(UTC) + timedelta(days=1))
    port = free_port()
    expired = service.identity(Address("127.0.0.1", port), controller=controller, life=EXPIRED)
    async with RotatingChannel(controller, expired.tls, grace_s=0.0) as channel:
        keeper = keeper_of(expired, channel, SleptClock())
        async with keeper.running():
            async with serving(service, tomorrow, port=port):
                await keeper.until_failed("this machine's clock")
            async with serving(service, port=port):
                await keeper.until_changed()
                assert await code_of_asking(channel) is grpc.StatusCode.OK


class QuietDesk:
    """A desk at which no push ever arrives."""

    def retry_failed(self) -> None:
        raise AssertionError("there is no controller to be welcomed by")


def link_over(channel: grpc.aio.Channel) -> Link:
    hello = AgentHello(AgentId("gate-1"), SiteId("berlin"), "1", "boot", Position(0, 0), ())

    def connect(on_state: Callable[[SessionState], None]) -> Session:
        stub, quiet = FleetServiceStub(channel), QuietDesk()
        return Session(stub, quiet, quiet, hello=hello, limits=SessionLimits(), on_state=on_state)  # type: ignore[arg-type]  # never opened

    policy = ReconnectPolicy(base_s=0.01, cap_s=0.01, first_delay_s=0.0)
    return Link(connect, policy=policy, clock=SystemClock())


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[None]:
    task = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(20):
            yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def another_authority(service: FakeEnrolment) -> AsyncIterator[Address]:
    async with mutual_port(FakeAuthority("another").controller()) as address:
        yield address


@asynccontextmanager
async def another_name(service: FakeEnrolment) -> AsyncIterator[Address]:
    async with mutual_port(service.authority.controller(dns="printer.example")) as address:
        yield address


@asynccontextmanager
async def no_such_host(service: FakeEnrolment) -> AsyncIterator[Address]:
    yield Address("controller.invalid", 7443)


Place = Callable[[FakeEnrolment], AbstractAsyncContextManager[Address]]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (another_authority, "CERTIFICATE_VERIFY_FAILED"),
        (another_name, "Hostname Verification Check failed"),
        (no_such_host, "controller.invalid"),
    ],
)
async def test_D04_what_is_not_the_controller_is_told_and_the_agent_keeps_serving(
    service: FakeEnrolment, place: Place, words: str
) -> None:
    async with place(service) as address, RotatingChannel(address, service.identity(address).tls) as channel:
        link, offload = link_over(channel), Offload(channel, OffloadSettings(), clock=SystemClock())
        pool = ModelPool(RuntimeSettings(), clock=SystemClock())
        await pool.host(echo_model(cascade=cascade_of()))
        plane = EdgeDataPlane(pool, offload, tracing=Tracing("test", UNSAMPLED), clock=SystemClock())
        async with running(link):
            answer = await plane.infer(request_of(UNSURE), Call())
            while words not in link.status.last_error:
                await asyncio.sleep(0.01)
    assert answer.parameters["tier"] == "edge"
    assert link.status.state is not SessionState.OPEN


async def test_D04_a_token_of_another_fleet_is_refused_before_its_secret_leaves(
    service: FakeEnrolment, enrolment: Address, tmp_path: Path
) -> None:
    token = token_for(enrolment, FakeAuthority("another"))
    with pytest.raises(Untrusted, match="another fleet"):
        await asyncio.to_thread(
            enrol, token, IdentityFolder(tmp_path / "identity"), root_file=tmp_path / "trust" / "root.json"
        )
    assert service.requests == []
