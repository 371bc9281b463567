"""Who may call what on the mTLS port: one table from method to roles, enforced before any servicer sees the call.

    certificate of the connection ──▶ caller_of ──▶ the table: role? ──▶ admission: banned, superseded? ──▶ its share
    of the calls in progress: free? ──▶ servicer

What is not in the table is refused, also when somebody registers it. A test proves that the table and the registered
methods are the same.
"""

import inspect
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from controller.identity.authority import BACKDATED, public_key_of
from controller.identity.model import Caller
from core.errors import ErrorCode, Forbidden, NanofleetError, Overloaded, Unauthenticated, Untrusted
from core.fleet_state import AgentHello
from core.ids import AgentId, SiteId
from core.logs import peer_text
from core.spiffe import Peer, Role, parse_spiffe
from core.status import STATUS

_log = logging.getLogger(__name__)

_Q = TypeVar("_Q")
_A = TypeVar("_A")
# Not generic at run time.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[_Q, _A]"

# Devices and brokers speak MQTT: nothing here is for them.
_ALL = frozenset(Role) - {Role.DEVICE, Role.BROKER}
_AGENT = frozenset({Role.AGENT})
_INFERENCE = frozenset({Role.AGENT, Role.APPLICATION})

POLICY: Mapping[str, frozenset[Role]] = {
    "/nanofleet.fleet.v1.FleetService/Session": _AGENT,
    "/nanofleet.artifacts.v1.ArtifactService/Fetch": frozenset({Role.HEAVY}),
    "/nanofleet.artifacts.v1.DeliveryService/FetchManifest": _AGENT,
    "/nanofleet.artifacts.v1.DeliveryService/FetchChunks": _AGENT,
    "/nanofleet.catalogue.v1.CatalogueService/GetMetadata": _AGENT,
    "/nanofleet.records.v1.RecordService/Append": _AGENT,
    "/nanofleet.samples.v1.SamplesService/Offer": _AGENT,
    "/nanofleet.samples.v1.SamplesService/Upload": _AGENT,
    "/inference.GRPCInferenceService/ServerLive": _INFERENCE,
    "/inference.GRPCInferenceService/ServerReady": _INFERENCE,
    "/inference.GRPCInferenceService/ModelReady": _INFERENCE,
    "/inference.GRPCInferenceService/ServerMetadata": _INFERENCE,
    "/inference.GRPCInferenceService/ModelMetadata": _INFERENCE,
    "/inference.GRPCInferenceService/ModelInfer": _INFERENCE,
    "/inference.GRPCInferenceService/RepositoryIndex": _INFERENCE,
    # Refused by the gateway, which says why.
    "/inference.GRPCInferenceService/ModelStatistics": _INFERENCE,
    "/inference.GRPCInferenceService/RepositoryModelLoad": _INFERENCE,
    "/inference.GRPCInferenceService/RepositoryModelUnload": _INFERENCE,
    "/opentelemetry.proto.collector.trace.v1.TraceService/Export": frozenset(
        {Role.AGENT, Role.HEAVY, Role.APPLICATION}
    ),
    "/grpc.health.v1.Health/Check": _ALL,
    "/grpc.health.v1.Health/List": _ALL,
    # Not Watch: nobody needs it, and it would hold a call for ever.
}

# Calls in progress of one certified name, whatever its connections. Derived: an agent has a session, transfers, spans,
# and by default 64 escalations; applications and replicas ask for many at the same time.
MAX_CALLS: Mapping[Role, int] = {Role.AGENT: 96, Role.APPLICATION: 512, Role.HEAVY: 512, Role.CONTROLLER: 96}

# Derived: a certificate has about 900 bytes; 4096 agents that call all the time.
_REMEMBERED_CERTIFICATES = 4096


class Doorkeeper(Protocol):
    """What identity knows of callers."""

    def admit(self, caller: Caller) -> None:
        """Let pass who may call. Raises Unauthenticated, Forbidden or Untrusted."""
        ...

    def site_of(self, agent: AgentId) -> SiteId | None: ...


def caller_of(context: Context) -> Caller:
    """Return who calls, as the certificate of the connection says.

    Raises:
        Unauthenticated: the connection shows none.
        Untrusted: it is none of ours.
    """
    shown = list(context.auth_context().get("x509_pem_cert", ()))
    if not shown:
        raise Unauthenticated("expected a client certificate of this fleet, got none; enrol first")
    return _caller(shown[0])


def agent_of(context: Context) -> AgentId:
    """Return the agent that calls a method which the table gives to agents alone."""
    return AgentId(caller_of(context).peer.name)


def admitted_agent(doorkeeper: Doorkeeper) -> Callable[[Context], Callable[[], AgentId]]:
    """Return what names the agent of a call as often as it is asked, and raises when it may not call any more.

    For calls that last: to read the certificate of a connection again takes longer than to judge it.
    """

    def of(context: Context) -> Callable[[], AgentId]:
        caller = caller_of(context)

        def admitted() -> AgentId:
            doorkeeper.admit(caller)
            return AgentId(caller.peer.name)

        return admitted

    return of


@lru_cache(maxsize=_REMEMBERED_CERTIFICATES)
def _caller(pem: bytes) -> Caller:
    certificate = x509.load_pem_x509_certificate(pem)
    key = certificate.public_key()
    names = _names(certificate)
    if len(names) != 1 or not isinstance(key, ec.EllipticCurvePublicKey):
        raise Untrusted(f"certificate: expected a P-256 key and one SPIFFE id, got {len(names)} ids")
    issued_at: datetime = certificate.not_valid_before_utc + BACKDATED
    serial = f"{certificate.serial_number:x}"
    return Caller(parse_spiffe(names[0]), public_key_of(key), serial, issued_at, certificate.not_valid_after_utc)


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(x509.UniformResourceIdentifier)


class PolicyInterceptor(grpc.aio.ServerInterceptor):
    """Enforces the table, the admission and the share of one peer on every call."""

    def __init__(self, doorkeeper: Doorkeeper, *, policy: Mapping[str, frozenset[Role]] = POLICY) -> None:
        self._doorkeeper = doorkeeper
        self._policy = policy
        self._refused: set[tuple[str, ErrorCode]] = set()
        self._in_progress: Counter[Peer] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler[_Q, _A] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler[_Q, _A] | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            # gRPC answers UNIMPLEMENTED: nobody may call what does not exist.
            return None
        return self._guarded(handler, handler_call_details.method)

    def _guarded(self, handler: "Handler[_Q, _A]", method: str) -> "Handler[_Q, _A]":
        kind = f"{_word(handler.request_streaming)}_{_word(handler.response_streaming)}"
        behaviour = getattr(handler, kind)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        guard = self._guard_stream if inspect.isasyncgenfunction(behaviour) else self._guard_call
        guarded: Handler[_Q, _A] = make(
            guard(behaviour, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return guarded

    def _guard_call(self, behaviour: Callable[..., Awaitable[object]], method: str) -> Callable[..., Awaitable[object]]:
        """Guard a coroutine, which may also write to the context."""

        async def guarded(request: object, context: Context) -> object:
            await self._require(method, context)
            return await behaviour(request, context)

        return guarded

    def _guard_stream(
        self, behaviour: Callable[..., AsyncGenerator[object, None]], method: str
    ) -> Callable[..., AsyncGenerator[object, None]]:
        """Guard an async generator."""

        async def guarded(request: object, context: Context) -> AsyncGenerator[object, None]:
            await self._require(method, context)
            async with aclosing(behaviour(request, context)) as answers:
                async for answer in answers:
                    yield answer

        return guarded

    async def _require(self, method: str, context: Context) -> None:
        """Abort the call unless its caller may make it."""
        try:
            caller = caller_of(context)
            self._check(method, caller)
            self._count(caller.peer, context)
        except NanofleetError as refusal:
            self._note(method, refusal, context)
            await context.abort(STATUS[refusal.code].grpc, str(refusal))

    def _check(self, method: str, caller: Caller) -> None:
        roles = self._policy.get(method, frozenset())
        if caller.peer.role not in roles:
            expected = " or ".join(sorted(roles)) or "nobody"
            raise Forbidden(f"{method}: expected the role {expected}, got {caller.peer.role}")
        self._doorkeeper.admit(caller)

    def _count(self, peer: Peer, context: Context) -> None:
        """Count the call until it ends, however it does."""
        if self._in_progress[peer] >= MAX_CALLS[peer.role]:
            raise Overloaded(
                f"{peer.name}: expected at most {MAX_CALLS[peer.role]} calls at a time; wait for some to end"
            )
        self._in_progress[peer] += 1
        # The stubs declare a class where any callable is meant.
        context.add_done_callback(lambda _context: self._forget(peer))  # type: ignore[arg-type]

    def _forget(self, peer: Peer) -> None:
        self._in_progress[peer] -= 1
        if not self._in_progress[peer]:
            del self._in_progress[peer]

    def _note(self, method: str, refusal: NanofleetError, context: Context) -> None:
        """Log a refusal; repeats of a kind at DEBUG, for who is refused comes back for ever."""
        kind = (method, refusal.code)
        level = logging.DEBUG if kind in self._refused else logging.WARNING
        self._refused.add(kind)
        _log.log(level, "call refused", extra={"peer": context.peer(), "reason": peer_text(str(refusal))})


def require_own_name(doorkeeper: Doorkeeper) -> Callable[[AgentHello, Context], None]:
    """Return the check that an agent introduces itself as its certificate does, at the site of its token.

    It is admitted once more: seconds may lie between the call and its Hello, and a ban between them ends only sessions.
    """

    def check(hello: AgentHello, context: Context) -> None:
        caller = caller_of(context)
        doorkeeper.admit(caller)
        peer = caller.peer
        if peer.role is not Role.AGENT or peer.name != hello.agent_id:
            raise Forbidden(f"hello: expected the agent {peer.name} of the certificate, got {hello.agent_id}")
        site = doorkeeper.site_of(hello.agent_id)
        if site is not None and site != hello.site:
            raise Forbidden(f"hello: expected site {site}, for which the agent was enrolled, got {hello.site}")

    return check


def _word(is_streaming: bool) -> str:
    return "stream" if is_streaming else "unary"
