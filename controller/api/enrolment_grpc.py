"""EnrolmentService on a port of its own: TLS that shows the controller's certificate only, for who has none yet.

Anybody may dial it, so everything is scarce: a connection lives for seconds, a call is counted against its address and
against all before its message is read, the message must come soon and be small. Enrolling and renewing are counted
apart: a flood of made-up tokens leaves room for the agents that renew. A challenge keeps no state and has a share of
its own, so that asking for challenges does not use up renewals.

The three calls are unary on the wire and served as streams, because only then their message can be waited for with a
deadline here; gRPC itself would wait as long as the peer likes.

What remains: gRPC counts connections, not whose they are, and accepts before anything here is asked. A peer that opens
thousands of them every few seconds still keeps others out; against that stands a packet filter in front of the port,
which counts connections of an address. Renewals are due days before they are needed, so they outlast it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from controller.api.rate_limits import RateLimiter
from controller.identity.model import Credential
from controller.identity.service import Identity
from core.addresses import Address
from core.clock import Clock
from core.errors import DeadlineExceeded, ErrorCode, InternalError, InvalidRequest, NanofleetError, Unavailable
from core.logs import peer_text
from core.status import STATUS
from core.token_bucket import Rate
from protos.identity.v1 import identity_pb2 as pb

_log = logging.getLogger(__name__)

# Derived: a request of 4 KiB, a signature, a nonce and a name stay below half of it.
MAX_REQUEST_BYTES = 16 << 10
# Chosen: a peer needs one round trip for its message; slow mobile links have seconds.
READ_TIMEOUT_S = 5.0
# The database is behind when an answer takes longer; the agent tries again.
ANSWER_TIMEOUT_S = 10.0
# Chosen: TLS takes two round trips; who says nothing makes room again soon.
HANDSHAKE_TIMEOUT_S = 3.0
# Chosen: an agent makes two calls on a connection and leaves.
CONNECTION_AGE_S = 20.0
# Derived: 2,700 silent connections a second fill it, each costs a socket and a few kB.
MAX_CONNECTIONS = 8192
MAX_CALLS = 1024
_CALLS_PER_CONNECTION = 4
STOP_GRACE_S = 2.0

# Chosen: signing takes about a millisecond, and 20 a second enrol 2,000 devices in less than two minutes; the share of
# an address is for a site behind one router.
ENROL_RATE, ENROL_ADDRESS_RATE = Rate(20.0, 200), Rate(5.0, 50)
# Derived: 100,000 agents that renew at half-life do so every 3 s; the burst is for a site that was without power.
RENEW_RATE, RENEW_ADDRESS_RATE = Rate(100.0, 1000), Rate(10.0, 200)
# A challenge costs a MAC.
CHALLENGE_RATE, CHALLENGE_ADDRESS_RATE = Rate(1000.0, 5000), Rate(10.0, 200)

_SERVICE = pb.DESCRIPTOR.services_by_name["EnrolmentService"].full_name
_Request = TypeVar("_Request", bound=Message)
_Answer = TypeVar("_Answer", bound=Message)
# Not generic at run time.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class CatalogueRoot(Protocol):
    """What enrolment asks of the catalogue."""

    async def trust_root(self, sha256: bytes = b"") -> bytes:
        """Return the root metadata with which a new machine begins; its SHA-256 stands in the token.

        It is the newest when none is named. Raises NotFound when there is none with that digest.
        """
        ...


class EnrolmentServicer:
    def __init__(
        self, identity: Identity, root: CatalogueRoot, *, clock: Clock, read_timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self._identity = identity
        self._read_timeout_s = read_timeout_s
        self._root = root
        self._clock = clock
        now_s = clock.monotonic_s()
        self._enrolments = RateLimiter(overall=ENROL_RATE, per_address=ENROL_ADDRESS_RATE, now_s=now_s)
        self._challenges = RateLimiter(overall=CHALLENGE_RATE, per_address=CHALLENGE_ADDRESS_RATE, now_s=now_s)
        self._renewals = RateLimiter(overall=RENEW_RATE, per_address=RENEW_ADDRESS_RATE, now_s=now_s)
        self._refused: set[ErrorCode] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        calls: dict[str, Handler] = {
            "Enrol": self._handler(pb.EnrolRequest, self._enrol, self._enrolments),
            "Challenge": self._handler(pb.ChallengeRequest, self._challenge, self._challenges),
            "Renew": self._handler(pb.RenewRequest, self._renew, self._renewals),
        }
        server.add_registered_method_handlers(_SERVICE, calls)

    async def _enrol(self, request: pb.EnrolRequest) -> pb.Credential:
        root = await self._root.trust_root(request.root_sha256)
        credential = _encoded(await self._identity.enrol(request.secret, request.csr, request.wanted_id))
        credential.catalogue_root = root
        return credential

    async def _challenge(self, request: pb.ChallengeRequest) -> pb.ChallengeReply:
        return pb.ChallengeReply(nonce=self._identity.challenge(request.agent_id))

    async def _renew(self, request: pb.RenewRequest) -> pb.Credential:
        renewed = await self._identity.renew(
            request.agent_id, nonce=request.nonce, csr=request.csr, signature=request.signature
        )
        return _encoded(renewed)

    def _handler(
        self, kind: type[_Request], answer: Callable[[_Request], Awaitable[_Answer]], limiter: RateLimiter
    ) -> Handler:
        async def serve(_requests: object, context: Context) -> _Answer:
            try:
                limiter.take(context.peer(), now_s=self._clock.monotonic_s())
                return await _in_time(answer(await _read(kind, context, timeout_s=self._read_timeout_s)))
            except NanofleetError as error:
                refusal = error
            except Exception:
                _log.exception("enrolment call failed by a defect")
                refusal = InternalError("internal error; the controller's log has the cause")
            self._note(refusal, context)
            return await context.abort(STATUS[refusal.code].grpc, str(refusal))

        # Bytes in, so that a message that does not parse is answered like every other malformed one.
        return grpc.stream_unary_rpc_method_handler(
            serve,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _note(self, refusal: NanofleetError, context: Context) -> None:
        """Log a refusal; repeats of a kind at DEBUG, for anybody may call here as often as he likes."""
        level = logging.DEBUG if refusal.code in self._refused else logging.WARNING
        self._refused.add(refusal.code)
        _log.log(level, "enrolment call refused", extra={"peer": context.peer(), "reason": peer_text(str(refusal))})


class EnrolmentServer:
    """Bound when made, serves between `start` and `stop`."""

    def __init__(
        self,
        bind: Address,
        credentials: grpc.ServerCredentials,
        *,
        connection_age_s: float = CONNECTION_AGE_S,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._server = grpc.aio.server(
            interceptors=interceptors, options=_options(connection_age_s), maximum_concurrent_rpcs=MAX_CALLS
        )
        try:
            port = self._server.add_secure_port(str(bind), credentials)
        except RuntimeError as error:
            raise Unavailable(
                f"enrolment_bind: cannot listen on {bind}; stop what listens there, or set another port"
            ) from error
        self.address = Address(bind.host, port)

    async def start(self, servicer: EnrolmentServicer) -> None:
        servicer.add_to(self._server)
        await self._server.start()

    async def stop(self) -> None:
        """Let calls finish for STOP_GRACE_S, end the rest. May be called again."""
        await self._server.stop(STOP_GRACE_S)


def _options(connection_age_s: float) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_concurrent_streams", _CALLS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", int(min(HANDSHAKE_TIMEOUT_S, connection_age_s) * 1000)),
        ("grpc.max_connection_idle_ms", int(connection_age_s * 1000)),
        ("grpc.max_connection_age_ms", int(connection_age_s * 1000)),
        ("grpc.max_connection_age_grace_ms", int(ANSWER_TIMEOUT_S * 1000)),
        # Two servers on one port would share it silently.
        ("grpc.so_reuseport", 0),
    ]


async def _read(kind: type[_Request], context: Context, *, timeout_s: float) -> _Request:
    try:
        async with asyncio.timeout(timeout_s):
            # At the end of the stream comes a marker that the annotations do not know.
            content: object = await context.read()
    except TimeoutError as error:
        raise DeadlineExceeded(f"expected the request within {timeout_s:g} s, got nothing") from error
    if not isinstance(content, bytes):
        raise InvalidRequest("expected one request, got none")
    try:
        return kind.FromString(content)
    except DecodeError as error:
        raise InvalidRequest(f"expected a {kind.DESCRIPTOR.name}, got bytes that are none") from error


async def _in_time(answer: Awaitable[_Answer]) -> _Answer:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await answer
    except TimeoutError as error:
        raise Unavailable("the controller is behind; try again later") from error


def _encoded(credential: Credential) -> pb.Credential:
    not_after = Timestamp()
    not_after.FromDatetime(credential.identity.not_after)
    return pb.Credential(
        agent_id=credential.identity.agent,
        site=credential.identity.site,
        certificate_chain=credential.certificate_chain,
        trust_bundle=credential.trust_bundle,
        not_after=not_after,
    )
