"""FleetService: the one stream of each agent.

    first message: Hello ──▶ Fleet.session ──▶ Welcome
    then, at the same time:  outbox ──▶ DesiredState to the agent      (the RPC's own task)
                             PushResult, ReportedState ──▶ Fleet       (a listener)

Whatever ends the stream puts its reason into the session, first come first served; the RPC's task then leaves with it.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import Protocol, TypeAlias, assert_never

import grpc
import grpc.aio

from controller.fleet import sessions
from controller.fleet.service import Fleet
from controller.fleet.sessions import Ended, Expelled, Faulty, Left, Permitted, Replaced, Stopping
from core.errors import DeadlineExceeded, ErrorCode, InvalidRequest, NanofleetError, TooLarge, Unavailable, Untrusted
from core.fleet_state import AgentHello, DesiredState, Position, SignedAssignment
from core.fleet_wire import (
    decode_hello,
    decode_push_result,
    decode_reported,
    decode_vitals,
    encode_assignment,
    encode_position,
)
from core.logs import peer_text
from core.samples import SampleOrder, decode_counts, encode_order
from core.status import STATUS
from protos.fleet.v1 import fleet_pb2 as pb
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceServicer

_log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
# Chosen: a peer that takes no push for so long is stuck; it dials again and starts with the newest state.
PUSH_TIMEOUT_S = 30.0
# Chosen: a key that an operator brings back counts within a minute; a director that is replaced counts at once.
UNSIGNED_PAUSE_S = 60.0
# Derived: 256 slot reports with names, digest and a problem of a few hundred characters stay below half of it.
MAX_AGENT_MESSAGE_BYTES = 1 << 20

Context = grpc.aio.ServicerContext[pb.AgentMessage, pb.ControllerMessage]
# Whether the peer may say this Hello; raises Forbidden.
HelloCheck: TypeAlias = Callable[[AgentHello, Context], None]
# The certificate authorities that agents shall trust now, PEM.
TrustBundleSource: TypeAlias = Callable[[], bytes]


class Director(Protocol):
    """Who says, signed, what an agent shall run."""

    async def signed(self, desired: DesiredState, hello: AgentHello) -> SignedAssignment:
        """Sign a desired state, with the catalogue metadata that the agent of `hello` lacks.

        Raises:
            Untrusted: nobody here may sign now.
        """
        ...


class FleetServicer(FleetServiceServicer):
    def __init__(
        self,
        fleet: Fleet,
        director: Director,
        *,
        check_hello: HelloCheck,
        trust_bundle: TrustBundleSource,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        push_timeout_s: float = PUSH_TIMEOUT_S,
        unsigned_pause_s: float = UNSIGNED_PAUSE_S,
    ) -> None:
        self._fleet = fleet
        self._check_hello = check_hello
        self._trust_bundle = trust_bundle
        self._director = director
        self._hello_timeout_s = hello_timeout_s
        self._push_timeout_s = push_timeout_s
        self._unsigned_pause_s = unsigned_pause_s
        self._is_unsigned = False
        self._refused: set[ErrorCode] = set()

    async def Session(self, request_iterator: object, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        try:
            ended = await self._hold(context)
        except NanofleetError as refused:
            ended = Faulty(refused)
        match ended:
            case Left():
                return
            case Replaced():
                await context.abort(grpc.StatusCode.ABORTED, "a newer session took over; agent ids must be unique")
            case Stopping():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the controller is stopping; connect again")
            case Expelled(reason):
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
            case Faulty(error):
                self._note(error, context)
                await context.abort(STATUS[error.code].grpc, str(error))
            case _:
                assert_never(ended)

    def _note(self, error: NanofleetError, context: Context) -> None:
        """Log a refusal; repeats of a kind at DEBUG, for a broken agent comes back for ever."""
        level = logging.DEBUG if error.code in self._refused else logging.WARNING
        self._refused.add(error.code)
        _log.log(level, "agent's session refused", extra={"peer": context.peer(), "reason": peer_text(str(error))})

    async def _hold(self, context: Context) -> Ended:
        hello = await self._hello(context)
        # Nothing is waited for between the check and the session: a ban in between would find no session to end.
        self._check_hello(hello, context)
        async with self._fleet.session(hello) as (session, position), asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self._listen(session, context), name=f"session {hello.agent_id}")
            ended = await self._push(session, hello, position, context)
            listening.cancel()
            return ended

    async def _hello(self, context: Context) -> AgentHello:
        try:
            async with asyncio.timeout(self._hello_timeout_s):
                message = await _read(context)
        except TimeoutError as error:
            raise DeadlineExceeded(f"expected Hello within {self._hello_timeout_s:g} s, got nothing") from error
        if message is None:
            # Not the agent's fault: its connection broke, or gRPC lost the start of the stream.
            raise Unavailable("expected Hello as the first message, got the end of the stream; connect again")
        if (kind := message.WhichOneof("message")) != "hello":
            raise InvalidRequest(f"expected Hello as the first message, got {kind or 'an unknown kind'}")
        return decode_hello(message.hello)

    async def _push(self, session: sessions.Session, hello: AgentHello, position: Position, context: Context) -> Ended:
        """Send Welcome, then whatever is newest, until the session ends."""
        try:
            await self._write(pb.ControllerMessage(welcome=pb.Welcome(desired=encode_position(position))), context)
            await self._renew_trust(session, context)
            unsigned: DesiredState | None = None
            while isinstance(taken := await self._taken(session, unsigned), DesiredState | Permitted | SampleOrder):
                if isinstance(taken, DesiredState):
                    unsigned = await self._assign(taken, hello, context)
                else:
                    await self._write(_word(taken), context)
        except NanofleetError as error:
            return Faulty(error)
        except TimeoutError:
            return Faulty(DeadlineExceeded(f"expected a push to be taken within {self._push_timeout_s:g} s"))
        return taken

    async def _renew_trust(self, session: sessions.Session, context: Context) -> None:
        """Send the trust bundle to an agent that says it has another."""
        if not session.trust_bundle_sha256:
            return
        bundle = self._trust_bundle()
        if hashlib.sha256(bundle).digest() != session.trust_bundle_sha256:
            await self._write(pb.ControllerMessage(trust_bundle=pb.TrustBundle(pem=bundle)), context)

    async def _taken(
        self, session: sessions.Session, unsigned: DesiredState | None
    ) -> DesiredState | sessions.Word | Ended:
        """Wait for what is to be pushed: something new, or after a pause once more what nobody could sign."""
        if unsigned is None:
            return await session.take()
        try:
            async with asyncio.timeout(self._unsigned_pause_s):
                return await session.take()
        except TimeoutError:
            return unsigned

    async def _assign(self, desired: DesiredState, hello: AgentHello, context: Context) -> DesiredState | None:
        """Push a desired state; return it if nobody may sign it now, which is no reason to send the agent away."""
        try:
            signed = await self._director.signed(desired, hello)
        except Untrusted as error:
            level = logging.DEBUG if self._is_unsigned else logging.ERROR
            self._is_unsigned = True
            _log.log(level, "agents are told nothing new: nobody may sign it", extra={"reason": str(error)})
            return desired
        self._is_unsigned = False
        await self._write(pb.ControllerMessage(assignment=encode_assignment(signed)), context)
        self._fleet.pushes.sent += 1
        return None

    async def _write(self, message: pb.ControllerMessage, context: Context) -> None:
        async with asyncio.timeout(self._push_timeout_s):
            await context.write(message)

    async def _listen(self, session: sessions.Session, context: Context) -> None:
        """Pass on what the agent says, until it leaves or says something that we do not accept."""
        try:
            while (message := await _read(context)) is not None:
                self._hear(session, message)
            session.end(Left())
        except NanofleetError as error:
            session.end(Faulty(error))

    def _hear(self, session: sessions.Session, message: pb.AgentMessage) -> None:
        match message.WhichOneof("message"):
            case "result":
                self._fleet.push_result(session, decode_push_result(message.result))
            case "reported":
                self._fleet.reported(session, decode_reported(message.reported))
            case "vitals":
                self._fleet.vitals(session, decode_vitals(message.vitals))
            case "samples":
                self._fleet.samples.heard(session, decode_counts(message.samples))
            case "hello":
                raise InvalidRequest("expected Hello once, as the first message, got another")
            case None:
                # A newer agent's message; what we do not know, we do not need.
                return


def _word(word: sessions.Word) -> pb.ControllerMessage:
    if isinstance(word, SampleOrder):
        return pb.ControllerMessage(samples=encode_order(word))
    return pb.ControllerMessage(transfer=pb.TransferPermission(manifest_digest=word.manifest_digest))


async def _read(context: Context) -> pb.AgentMessage | None:
    """Return the agent's next message; None when it sends no more."""
    # At the end of the stream comes a marker that the annotations do not know.
    message: object = await context.read()
    if not isinstance(message, pb.AgentMessage):
        return None
    if (size_bytes := message.ByteSize()) > MAX_AGENT_MESSAGE_BYTES:
        raise TooLarge(f"agent message: expected at most {MAX_AGENT_MESSAGE_BYTES} bytes, got {size_bytes}")
    return message
