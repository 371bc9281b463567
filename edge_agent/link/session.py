"""One connection to the controller, from the call to its end. An object per connection; it is never used again.

    CONNECTING ─hello written─▶ HELLO_SENT ─welcome─▶ OPEN ─error, end, cancel─▶ CLOSED

While it is open, pushes go to the desk as they come, each is answered once, and the reported state follows every
change: whole, coalesced, never queued. What was not answered when the connection ends needs no memory here: the next
hello names the applied position, and the controller pushes again when that is not what it wants.

Silence is no failure (an agent in sync has nothing to say); gRPC's keepalive ends the call when the peer is gone.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import grpc
import grpc.aio

from core.digest import Digest, parse_digest
from core.errors import DeadlineExceeded, ErrorCode, InvalidRequest, NanofleetError, Unavailable
from core.fleet_state import (
    NOWHERE,
    AgentHello,
    AgentVitals,
    Problem,
    PushResult,
    ReportedState,
    SignedAssignment,
)
from core.fleet_wire import (
    decode_assignment,
    decode_position,
    encode_hello,
    encode_push_result,
    encode_reported,
    encode_vitals,
)
from core.logs import peer_text
from core.samples import NO_SAMPLES, SampleCounts, SampleOrder, decode_order, encode_counts
from core.status import error_from_grpc
from edge_agent.identity.channel import certificate_fault
from protos.fleet.v1 import fleet_pb2 as pb

# Chosen: progress bars stay smooth, and a fetch at full speed costs ten small messages a second.
REPORT_INTERVAL_S = 0.1
# Chosen: a dashboard that is a quarter of a minute behind is none the worse for it.
VITALS_INTERVAL_S = 15.0
# Chosen: whoever wants to retrain looks once a day; under load it is one small message.
SAMPLES_INTERVAL_S = 60.0
# Chosen: what an idle machine does not do by itself.
NEWS_TEMPERATURE_C = 5.0
NEWS_SHARE = 0.25
# Messages being taken or answered at one time; all but the newest are settled, so only a peer that does not read
# fills it.
MAX_PENDING_ANSWERS = 16
# Chosen: some hundred certificates.
MAX_TRUST_BUNDLE_BYTES = 1 << 18
# Trailing metadata by which a controller says when to come back.
RETRY_AFTER_KEY = "retry-after-ms"
# Chosen: a controller may not send an agent away for longer than this.
MAX_RETRY_AFTER_S = 3600.0

_log = logging.getLogger(__name__)


class SessionState(Enum):
    CONNECTING = "connecting"
    HELLO_SENT = "hello_sent"
    OPEN = "open"
    CLOSED = "closed"


class SessionEnded(Unavailable):
    """The connection is over; `because` is why, `retry_after_s` what the controller asked for."""

    def __init__(self, because: NanofleetError, *, retry_after_s: float | None = None) -> None:
        super().__init__(str(because))
        self.because = because
        self.retry_after_s = retry_after_s


class Replaced(SessionEnded):
    """The call was cancelled by whoever owns the channel, which has another connection: nothing is wrong."""

    def __init__(self) -> None:
        super().__init__(Unavailable("the connection was replaced"))


class Call(Protocol):
    """The stream: what is used of grpc.aio.StreamStreamCall."""

    def __aiter__(self) -> AsyncIterator[pb.ControllerMessage]: ...

    async def write(self, request: pb.AgentMessage, /) -> None: ...

    async def code(self) -> grpc.StatusCode: ...

    async def details(self) -> str | None: ...

    def cancel(self) -> bool: ...


class FleetStub(Protocol):
    """What is used of the generated FleetServiceStub."""

    def Session(self) -> Call: ...  # noqa: N802 (named by the protocol)


class WatchedReport(Protocol):
    version: int

    def reported(self) -> ReportedState: ...

    async def wait_beyond(self, version: int) -> int: ...


class Desk(Protocol):
    """What is reported, and who wants to hear that the link is back."""

    @property
    def board(self) -> WatchedReport: ...

    def retry_failed(self) -> None: ...


class Intake(Protocol):
    """Who takes what the controller sends besides the state of the link."""

    async def push(self, signed: SignedAssignment) -> PushResult | None:
        """Verify and apply; one that is overtaken by the next returns at once. Refusals are results too.

        None: a push before it waits for the same answer.
        """
        ...

    async def trust_bundle(self, pem: bytes) -> None:
        """Take the certificate authorities to trust from now on."""
        ...

    async def permit_transfer(self, manifest_digest: Digest) -> None:
        """Take a person's word that whole chunks may be fetched for this variant."""
        ...

    def order_samples(self, order: SampleOrder) -> None:
        """Take a person's wish for hard examples, to be delivered by and by."""
        ...


@dataclass(frozen=True, slots=True)
class SessionLimits:
    handshake_timeout_s: float = 10.0
    write_timeout_s: float = 20.0


class Session:
    def __init__(
        self,
        stub: FleetStub,
        desk: Desk,
        intake: Intake,
        *,
        hello: AgentHello,
        limits: SessionLimits,
        on_state: Callable[[SessionState], None],
        vitals: Callable[[], AgentVitals] | None = None,
        samples: Callable[[], SampleCounts] | None = None,
    ) -> None:
        """`vitals`, `samples` None: nothing is said of them."""
        self._vitals = vitals
        self._samples = samples
        self.state = SessionState.CONNECTING
        self._stub = stub
        self._desk = desk
        self._hello = hello
        self._limits = limits
        self._on_state = on_state
        self._intake = intake
        # One writer at a time: gRPC allows a single write under way per stream.
        self._writing = asyncio.Lock()
        self._pending_answers = asyncio.Semaphore(MAX_PENDING_ANSWERS)

    async def run(self) -> None:
        """Serve the connection to its end, which is always a SessionEnded."""
        self._enter(SessionState.CONNECTING)
        call = self._stub.Session()
        try:
            messages = aiter(call)
            await self._shake_hands(call, messages)
            await self._converse(call, messages)
        except ExceptionGroup as group:
            ended, others = group.split(SessionEnded)
            if ended is None or others is not None:
                raise
            raise ended.exceptions[0] from None
        finally:
            call.cancel()
            self._enter(SessionState.CLOSED)

    async def _shake_hands(self, call: Call, messages: AsyncIterator[pb.ControllerMessage]) -> None:
        try:
            async with asyncio.timeout(self._limits.handshake_timeout_s):
                await self._write(call, pb.AgentMessage(hello=encode_hello(self._hello)))
                self._enter(SessionState.HELLO_SENT)
                message = await self._read(messages)
        except TimeoutError:
            waited_s = self._limits.handshake_timeout_s
            raise SessionEnded(DeadlineExceeded(f"expected a welcome within {waited_s:g} s, got none")) from None
        kind = message.WhichOneof("message")
        if kind != "welcome":
            raise SessionEnded(InvalidRequest(f"expected a welcome, got {kind}"))
        wanted = decode_position(message.welcome.desired)
        _log.info("connected to the controller", extra={"applied": self._hello.applied, "wanted": wanted})
        self._enter(SessionState.OPEN)
        self._desk.retry_failed()

    async def _converse(self, call: Call, messages: AsyncIterator[pb.ControllerMessage]) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._report_changes(call), name="session report")
            if self._vitals is not None:
                tasks.create_task(self._report_vitals(call, self._vitals), name="session vitals")
            if self._samples is not None:
                tasks.create_task(self._report_samples(call, self._samples), name="session samples")
            while True:
                message = await self._read(messages)
                await self._pending_answers.acquire()
                tasks.create_task(self._take(call, message), name="session intake")

    async def _take(self, call: Call, message: pb.ControllerMessage) -> None:
        try:
            result = await self._taken(message)
            if result is not None:
                await self._write(call, pb.AgentMessage(result=encode_push_result(result)))
        finally:
            self._pending_answers.release()

    async def _taken(self, message: pb.ControllerMessage) -> PushResult | None:
        """Return the answer to `message`, None when it wants none."""
        kind = message.WhichOneof("message")
        try:
            if kind == "assignment":
                return await self._intake.push(decode_assignment(message.assignment))
            if kind == "trust_bundle":
                await self._intake.trust_bundle(_bounded_pem(message.trust_bundle.pem))
            elif kind == "transfer":
                await self._intake.permit_transfer(parse_digest(message.transfer.manifest_digest))
            elif kind == "samples":
                self._intake.order_samples(decode_order(message.samples))
        except NanofleetError as error:
            # Another kind than these comes from a newer controller and is not for us.
            _log.warning(
                "a message of the controller was refused", extra={"kind": kind, "reason": peer_text(str(error))}
            )
            return PushResult(NOWHERE, Problem(error.code, str(error))) if kind == "assignment" else None
        return None

    async def _report_changes(self, call: Call) -> None:
        board = self._desk.board
        sent: ReportedState | None = None
        while True:
            version, reported = board.version, board.reported()
            if reported != sent:
                await self._write(call, pb.AgentMessage(reported=encode_reported(reported)))
                sent = reported
                await asyncio.sleep(REPORT_INTERVAL_S)
            await board.wait_beyond(version)

    async def _report_vitals(self, call: Call, look: Callable[[], AgentVitals]) -> None:
        """Say at once how it is, then what is news: silence costs nothing, and an idle link should stay so."""
        said: AgentVitals | None = None
        while True:
            vitals = look()
            if said is None or is_news(vitals, said):
                await self._write(call, pb.AgentMessage(vitals=encode_vitals(vitals)))
                said = vitals
            await asyncio.sleep(VITALS_INTERVAL_S)

    async def _report_samples(self, call: Call, look: Callable[[], SampleCounts]) -> None:
        """Say how many hard examples there are, whenever that has changed; an agent that keeps none says nothing."""
        said = NO_SAMPLES
        while True:
            if (counts := look()) != said:
                await self._write(call, pb.AgentMessage(samples=encode_counts(counts)))
                said = counts
            await asyncio.sleep(SAMPLES_INTERVAL_S)

    async def _write(self, call: Call, message: pb.AgentMessage) -> None:
        try:
            async with self._writing, asyncio.timeout(self._limits.write_timeout_s):
                await call.write(message)
        except TimeoutError:
            waited_s = self._limits.write_timeout_s
            raise SessionEnded(DeadlineExceeded(f"the controller took no message for {waited_s:g} s")) from None
        except asyncio.InvalidStateError:
            raise await _end_of(call) from None
        except grpc.aio.AioRpcError as error:
            raise _ended_by(error) from error

    async def _read(self, messages: AsyncIterator[pb.ControllerMessage]) -> pb.ControllerMessage:
        try:
            message = await anext(messages, None)
        except grpc.aio.AioRpcError as error:
            raise _ended_by(error) from error
        except asyncio.CancelledError:
            # gRPC raises this too when the call was cancelled from within, which is no wish to end this task.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Replaced from None
        if message is None:
            raise SessionEnded(Unavailable("the controller ended the session"))
        return message

    def _enter(self, state: SessionState) -> None:
        self.state = state
        self._on_state(state)


def is_news(vitals: AgentVitals, said: AgentVitals) -> bool:
    """Say whether anything has changed that somebody would want to know: noise of the machine is not worth a packet."""
    now, then = vitals.health, said.health
    warmer_c = abs((now.temperature_c or 0.0) - (then.temperature_c or 0.0))
    return (
        vitals.usage != said.usage
        or warmer_c >= NEWS_TEMPERATURE_C
        or _has_moved(now.available_bytes, then.available_bytes)
        or _has_moved(now.rss_bytes, then.rss_bytes)
    )


def _has_moved(now: int, then: int) -> bool:
    return abs(now - then) > NEWS_SHARE * then


async def _end_of(call: Call) -> SessionEnded:
    """Return why a call is over whose end showed first in a write."""
    code, details = await call.code(), await call.details()
    return Replaced() if code is grpc.StatusCode.CANCELLED else SessionEnded(_because(code, details))


def _bounded_pem(pem: bytes) -> bytes:
    if len(pem) > MAX_TRUST_BUNDLE_BYTES:
        raise InvalidRequest(f"trust bundle: expected at most {MAX_TRUST_BUNDLE_BYTES} bytes, got {len(pem)}")
    return pem


def _ended_by(error: grpc.aio.AioRpcError) -> SessionEnded:
    return SessionEnded(_because(error.code(), error.details()), retry_after_s=_retry_after_s(error))


def _because(code: grpc.StatusCode, details: str | None) -> NanofleetError:
    because = certificate_fault(code, details) or error_from_grpc(code, peer_text(details or code.name))
    if because.code is ErrorCode.INTERNAL:
        # gRPC ends about one stream in a hundred this way when many start at once; it passes.
        return Unavailable(str(because))
    return because


def _retry_after_s(error: grpc.aio.AioRpcError) -> float | None:
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_AFTER_KEY and isinstance(value, str) and value.isdecimal():
            return min(int(value[:12]) / 1000, MAX_RETRY_AFTER_S)
    return None
