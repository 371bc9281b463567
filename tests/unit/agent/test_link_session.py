"""Session: one connection, its states, and what is said on it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from core.digest import Digest
from core.errors import ErrorCode, Forbidden, InternalError, Overloaded, Unavailable, Untrusted
from core.fleet_state import (
    NOWHERE,
    AgentHello,
    AgentVitals,
    MetadataFile,
    Position,
    PushResult,
    SignedAssignment,
    Slot,
    SlotPhase,
    SlotReport,
)
from core.fleet_wire import MAX_METADATA_FILES, decode_hello, decode_push_result, decode_reported, encode_assignment
from core.ids import AgentId, ModelName, SiteId
from core.samples import SampleCount, SampleCounts, SampleOrder, decode_counts, encode_order
from edge_agent.link.session import (
    MAX_PENDING_ANSWERS,
    Replaced,
    Session,
    SessionEnded,
    SessionLimits,
    SessionState,
    is_news,
)
from edge_agent.reconcile.board import Board
from protos.fleet.v1 import fleet_pb2 as pb
from protos.samples.v1 import samples_pb2
from tests.support.fleet_call import FleetCall
from tests.support.variants import made_variant
from tests.support.vitals_values import MIB, made_vitals

HELLO = AgentHello(AgentId("gate-1"), SiteId("berlin"), "1.0", "boot", Position(1, 1), ("arch:x86_64",))
SIGNED = SignedAssignment(b"payload", b"signature", "key", (MetadataFile("timestamp.json", b"{}"),))
RESULT = PushResult(Position(1, 2))


class FakeDesk:
    def __init__(self) -> None:
        self.board = Board(NOWHERE)
        self.retries = 0

    def retry_failed(self) -> None:
        self.retries += 1


class FakeIntake:
    def __init__(self) -> None:
        self.pushed: list[SignedAssignment] = []
        self.bundles: list[bytes] = []
        self.permitted: list[Digest] = []
        self.ordered: list[SampleOrder] = []
        # A push is answered when it is set.
        self.is_applied = asyncio.Event()
        self.is_applied.set()
        # False: a push before waits for the same answer.
        self.has_answers = True

    async def push(self, signed: SignedAssignment) -> PushResult | None:
        self.pushed.append(signed)
        if not self.has_answers:
            return None
        await self.is_applied.wait()
        return RESULT

    async def trust_bundle(self, pem: bytes) -> None:
        self.bundles.append(pem)

    async def permit_transfer(self, manifest_digest: Digest) -> None:
        self.permitted.append(manifest_digest)

    def order_samples(self, order: SampleOrder) -> None:
        self.ordered.append(order)


class Line:
    """A session between a desk and a test that plays the controller."""

    def __init__(
        self,
        *,
        vitals: Callable[[], AgentVitals] | None = None,
        samples: Callable[[], SampleCounts] | None = None,
    ) -> None:
        self.call = FleetCall()
        self.desk = FakeDesk()
        self.intake = FakeIntake()
        self.states: list[SessionState] = []
        limits = SessionLimits(handshake_timeout_s=0.05, write_timeout_s=0.05)
        self.session = Session(
            self.call,
            self.desk,
            self.intake,
            hello=HELLO,
            limits=limits,
            on_state=self.states.append,
            vitals=vitals,
            samples=samples,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["asyncio.Task[None]"]:
        task = asyncio.create_task(self.session.run())
        try:
            async with asyncio.timeout(5):
                yield task
        finally:
            task.cancel()
            await asyncio.wait([task])

    @asynccontextmanager
    async def open(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Run the session up to the first report, which always comes."""
        async with self.running() as task:
            self.call.welcome()
            await self.heard("hello")
            await self.heard("reported")
            yield task

    async def settled(self) -> None:
        """Return once everything that was said before has been taken: the answer to a push comes after it."""
        pushed = len(self.intake.pushed)
        self.call.push(SIGNED)
        await self.heard("result")
        assert len(self.intake.pushed) == pushed + 1

    async def heard(self, kind: str) -> pb.AgentMessage:
        message = await self.call.heard.get()
        assert message.WhichOneof("message") == kind
        return message

    async def ending(self, task: "asyncio.Task[None]") -> SessionEnded:
        with pytest.raises(SessionEnded) as caught:
            await task
        return caught.value


@pytest.fixture
async def line() -> Line:
    return Line()


async def test_a_session_begins_with_hello(line: Line) -> None:
    async with line.running():
        message = await line.heard("hello")
        assert decode_hello(message.hello) == HELLO


async def test_it_is_open_after_the_welcome_and_not_before(line: Line) -> None:
    async with line.running():
        await line.heard("hello")
        assert line.session.state is SessionState.HELLO_SENT
        line.call.welcome()
        await line.heard("reported")
        assert line.states == [SessionState.CONNECTING, SessionState.HELLO_SENT, SessionState.OPEN]


async def test_an_open_session_gives_failed_slots_another_chance(line: Line) -> None:
    async with line.open():
        assert line.desk.retries == 1


async def test_without_a_welcome_in_time_it_ends(line: Line) -> None:
    async with line.running() as task:
        ended = await line.ending(task)
        assert ended.because.code is ErrorCode.DEADLINE_EXCEEDED
        assert "welcome within 0.05 s" in str(ended)
        assert line.session.state is SessionState.CLOSED


async def test_anything_but_a_welcome_first_ends_it(line: Line) -> None:
    async with line.running() as task:
        line.call.push(SIGNED)
        assert "expected a welcome, got assignment" in str(await line.ending(task))


async def test_the_call_is_cancelled_however_it_ends(line: Line) -> None:
    async with line.open() as task:
        task.cancel()
        await asyncio.wait([task])
        assert line.call.is_cancelled
        assert line.session.state is SessionState.CLOSED


async def test_a_push_goes_to_the_desk_as_it_came_and_is_answered_when_it_is_applied(line: Line) -> None:
    line.intake.is_applied.clear()
    async with line.open():
        line.call.push(SIGNED)
        while not line.intake.pushed:
            await asyncio.sleep(0)
        assert line.intake.pushed == [SIGNED]
        assert line.call.heard.empty()
        line.intake.is_applied.set()
        message = await line.heard("result")
        assert decode_push_result(message.result) == RESULT


async def test_a_message_of_a_newer_controller_is_passed_over(line: Line) -> None:
    async with line.open():
        line.call.say(pb.ControllerMessage())
        await line.settled()


async def test_the_reported_state_follows_a_change(line: Line) -> None:
    async with line.open():
        line.desk.board.apply(Position(1, 2))
        message = await line.heard("reported")
        assert decode_reported(message.reported).applied == Position(1, 2)


async def test_changes_in_quick_succession_are_reported_once(line: Line) -> None:
    slot: Slot = made_variant().slot
    async with line.open():
        for stored_bytes in range(50):
            line.desk.board.show([SlotReport(slot, SlotPhase.FETCHING, stored_bytes, 50)])
        message = await line.heard("reported")
        assert decode_reported(message.reported).slots[0].stored_bytes == 49
        assert line.call.heard.empty()


async def test_nothing_is_reported_while_nothing_changes(line: Line) -> None:
    async with line.open():
        line.desk.board.apply(NOWHERE)
        await asyncio.sleep(0)
        assert line.call.heard.empty()


async def test_the_end_of_the_stream_ends_the_session(line: Line) -> None:
    async with line.open() as task:
        line.call.end()
        assert (await line.ending(task)).because.retryable


async def test_an_abort_says_why(line: Line) -> None:
    async with line.open() as task:
        line.call.end(Forbidden("agent gate-1 is banned"))
        ended = await line.ending(task)
        assert ended.because.code is ErrorCode.FORBIDDEN
        assert str(ended) == "agent gate-1 is banned"


async def test_an_internal_error_of_the_transport_may_pass(line: Line) -> None:
    async with line.open() as task:
        line.call.end(InternalError("stream reset"))
        assert (await line.ending(task)).because.retryable


@pytest.mark.parametrize(
    ("value", "retry_after_s"), [("1500", 1.5), ("99999999999", 3600.0), ("-5", None), ("soon", None)]
)
async def test_a_controller_may_say_when_to_come_back_within_bounds(
    line: Line, value: str, retry_after_s: float | None
) -> None:
    async with line.open() as task:
        line.call.end(Overloaded("too many agents"), ("retry-after-ms", value))
        assert (await line.ending(task)).retry_after_s == retry_after_s


async def test_a_controller_that_does_not_read_ends_the_session(line: Line) -> None:
    async with line.open() as task:
        line.call.reads.clear()
        line.desk.board.apply(Position(1, 2))
        assert "took no message for 0.05 s" in str(await line.ending(task))


async def test_a_certificate_that_does_not_hold_is_said_in_plain_words(line: Line) -> None:
    async with line.open() as task:
        line.call.end(Unavailable("Ssl handshake failed: CERTIFICATE_VERIFY_FAILED: unable to get local issuer"))
        ended = await line.ending(task)
        assert isinstance(ended.because, Untrusted)
        assert str(ended).startswith("expected the fleet's controller, its certificate does not hold here")
        assert "unable to get local issuer" in str(ended)


async def test_a_call_that_its_channel_cancels_is_no_failure(line: Line) -> None:
    async with line.open() as task:
        line.call.replace()
        assert isinstance(await line.ending(task), Replaced)


async def test_assignments_without_an_answer_of_their_own_never_deafen_the_session(line: Line) -> None:
    line.intake.has_answers = False
    async with line.open():
        for _ in range(MAX_PENDING_ANSWERS + 4):
            line.call.push(SIGNED)
        while len(line.intake.pushed) < MAX_PENDING_ANSWERS + 4:
            await asyncio.sleep(0)
        line.intake.has_answers = True
        await line.settled()


async def test_an_assignment_beyond_its_bounds_is_answered_without_being_taken(line: Line) -> None:
    crowd = tuple(MetadataFile(f"{number}.json", b"") for number in range(MAX_METADATA_FILES + 1))
    async with line.open():
        line.call.say(pb.ControllerMessage(assignment=encode_assignment(replace(SIGNED, catalogue=crowd))))
        result = decode_push_result((await line.heard("result")).result)
        assert line.intake.pushed == []
        assert result.position == NOWHERE
        assert result.problem is not None
        assert result.problem.code == ErrorCode.INVALID_REQUEST


async def test_a_trust_bundle_is_handed_on(line: Line) -> None:
    async with line.open():
        line.call.say(pb.ControllerMessage(trust_bundle=pb.TrustBundle(pem=b"authorities")))
        await line.settled()
        assert line.intake.bundles == [b"authorities"]


async def test_a_trust_bundle_beyond_its_bound_is_dropped_and_the_session_stays(line: Line) -> None:
    async with line.open() as task:
        line.call.say(pb.ControllerMessage(trust_bundle=pb.TrustBundle(pem=bytes(1 << 19))))
        await line.settled()
        assert line.intake.bundles == []
        assert not task.done()


async def test_a_permission_to_transfer_is_handed_on(line: Line) -> None:
    digest = made_variant().digest
    async with line.open():
        line.call.say(pb.ControllerMessage(transfer=pb.TransferPermission(manifest_digest=digest)))
        await line.settled()
        assert line.intake.permitted == [digest]


async def test_a_permission_for_no_manifest_is_dropped_and_the_session_stays(line: Line) -> None:
    async with line.open() as task:
        line.call.say(pb.ControllerMessage(transfer=pb.TransferPermission(manifest_digest="all")))
        await line.settled()
        assert line.intake.permitted == []
        assert not task.done()


async def test_an_open_session_says_vitals_at_once_and_nothing_more_without_news() -> None:
    line = Line(vitals=made_vitals)
    async with line.running():
        line.call.welcome()
        kinds = [(await line.call.heard.get()).WhichOneof("message") for _ in range(3)]
        assert sorted(map(str, kinds)) == ["hello", "reported", "vitals"]
        await line.settled()


@pytest.mark.parametrize(
    ("vitals", "expected"),
    [
        (made_vitals(uptime_s=500.0, load=3.0), False),
        (made_vitals(rss_bytes=81 * MIB, available_bytes=380 * MIB, temperature_c=50.0), False),
        (made_vitals(1), True),
        (made_vitals(refused=1), True),
        (made_vitals(temperature_c=55.0), True),
        (made_vitals(rss_bytes=101 * MIB), True),
        (made_vitals(available_bytes=200 * MIB), True),
    ],
)
def test_only_what_somebody_wants_to_know_is_news(vitals: AgentVitals, expected: bool) -> None:
    assert is_news(vitals, made_vitals()) is expected


ORDER = SampleOrder("0" * 32, ModelName("digits"), 5, None, datetime(2026, 3, 1, tzinfo=UTC))


async def test_a_wish_for_samples_is_handed_on_and_needs_no_answer(line: Line) -> None:
    async with line.open():
        line.call.say(pb.ControllerMessage(samples=encode_order(ORDER)))
        await line.settled()
    assert line.intake.ordered == [ORDER]


async def test_a_wish_that_does_not_parse_is_passed_over(line: Line) -> None:
    async with line.open():
        line.call.say(pb.ControllerMessage(samples=samples_pb2.Order(pull_id="../x", model="digits", limit=5)))
        await line.settled()
    assert not line.intake.ordered


async def test_an_agent_says_once_how_many_samples_it_keeps() -> None:
    counts = SampleCounts((SampleCount("digits", 7, "low_confidence", 3),), 0, 900)
    line = Line(samples=lambda: counts)
    async with line.open():
        message = await line.heard("samples")
        assert decode_counts(message.samples) == counts
        await line.settled()
        assert line.call.heard.empty()


async def test_an_agent_without_samples_says_nothing_of_them() -> None:
    line = Line(samples=SampleCounts)
    async with line.open():
        await line.settled()
        assert line.call.heard.empty()
