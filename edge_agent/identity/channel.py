"""The agent's one channel to the controller, which stays the same object while its certificate is replaced.

Stubs are made once and kept. What they get from here is bound to the present connection, and bound anew when that is
replaced; so a renewal reaches all of them, and calls under way end on the connection that they began on.

A call that gRPC cancels raises CancelledError in a task that nobody cancelled, which ends loops that should run for
ever. Therefore only streams in both directions are cancelled, after a grace: they have no end of their own, and their
owner (`edge_agent.link.session`) takes it as the end of a connection. Every other call has a deadline of its own.
"""

import asyncio
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from core.addresses import Address
from core.errors import NanofleetError, Untrusted
from core.grpc_transport import MUTUAL_TLS_OPTIONS, TlsIdentity, TransportCredentials, open_channel
from core.logs import peer_text
from core.status import error_from_grpc

# Chosen: pushes under way are answered in it; the session, which would stay for days, is made anew after it.
REPLACED_GRACE_S = 20.0
# Chosen: how often is looked whether the last call on a replaced connection has ended.
_LOOK_INTERVAL_S = 1.0
# Derived: a certificate chain and a bundle, a few kB each, and the root of the catalogue.
_MAX_CREDENTIAL_BYTES = 1 << 20
# For the enrolment port, where only the controller shows a certificate: the peer must be the fleet's controller.
ENROLMENT_OPTIONS = [*MUTUAL_TLS_OPTIONS, ("grpc.max_receive_message_length", _MAX_CREDENTIAL_BYTES)]
# What gRPC says when a certificate does not chain to our authorities, is not for the name, or not for today.
# The second: an authority of the same name and with another key, such as another fleet's.
_CERTIFICATE_FAULTS = ("CERTIFICATE_VERIFY_FAILED", "certificate signature failure", "Hostname Verification")


def error_of_call(code: grpc.StatusCode, details: str | None, *, target: Address) -> NanofleetError:
    """Return what a failed call to `target` stands for; Untrusted: the peer is not the fleet's controller."""
    fault = certificate_fault(code, details)
    if fault is not None:
        return Untrusted(f"{target}: {fault}")
    return error_from_grpc(code, f"{target}: {peer_text(details or code.name)}")


def certificate_fault(code: grpc.StatusCode, details: str | None) -> Untrusted | None:
    """Return in plain words that a call failed because of the peer's certificate; None: it did not."""
    if code is not grpc.StatusCode.UNAVAILABLE or not any(fault in (details or "") for fault in _CERTIFICATE_FAULTS):
        return None
    return Untrusted(
        "expected the fleet's controller, its certificate does not hold here; check the address and this machine's "
        f"clock, or enrol again: {peer_text(details or '')}"
    )


class _Connection:
    """One inner channel and what goes on over it; a call that nobody holds any more is not held here either."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.calls: weakref.WeakSet[grpc.aio.Call] = weakref.WeakSet()
        self.streams: weakref.WeakSet[grpc.aio.Call] = weakref.WeakSet()

    async def retire(self, *, grace_s: float) -> None:
        """Close once all that goes on has ended; streams in both directions are ended after `grace_s`."""
        await asyncio.sleep(grace_s)
        for stream in list(self.streams):
            stream.cancel()
        # An event, set by the last call to end, would cost every call.
        while any(not call.done() for call in list(self.calls)):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_INTERVAL_S)
        await self.channel.close()


class _Method:
    """One method of a stub, bound to the present connection."""

    __slots__ = ("__weakref__", "_calls", "_inner", "_make")

    def __init__(self, make: Callable[[grpc.aio.Channel], Any]) -> None:
        self._make = make

    def bind(self, connection: _Connection) -> None:
        self._inner = self._make(connection.channel)
        is_endless = isinstance(self._inner, grpc.aio.StreamStreamMultiCallable)
        self._calls = connection.streams if is_endless else connection.calls

    def __call__(self, *args: Any, **options: Any) -> Any:
        call = self._inner(*args, **options)
        self._calls.add(call)
        return call


class RotatingChannel(grpc.aio.Channel):
    """To `target`; `credentials` are those of the first connection. Closing it ends replaced connections at once."""

    def __init__(
        self,
        target: Address,
        credentials: TransportCredentials | TlsIdentity,
        *,
        grace_s: float = REPLACED_GRACE_S,
    ) -> None:
        self._target = target
        self._grace_s = grace_s
        self._present = _Connection(open_channel(target, credentials))
        self._methods: weakref.WeakSet[_Method] = weakref.WeakSet()
        self._retiring: dict[asyncio.Task[None], _Connection] = {}

    def replace(self, credentials: TransportCredentials | TlsIdentity) -> None:
        """Send every call from now on over a new connection."""
        replaced, self._present = self._present, _Connection(open_channel(self._target, credentials))
        for method in self._methods:
            method.bind(self._present)
        task = asyncio.create_task(replaced.retire(grace_s=self._grace_s), name="replaced connection")
        self._retiring[task] = replaced
        task.add_done_callback(self._retiring.pop)

    async def reaches_with(self, credentials: TlsIdentity, *, timeout_s: float) -> bool:
        """Say whether a connection with `credentials` comes up within `timeout_s`; it is closed again.

        READY comes with the peer's first HTTP/2 frame, and so after the peer has accepted this side's certificate.
        """
        channel = open_channel(self._target, credentials)
        try:
            async with asyncio.timeout(timeout_s):
                await channel.channel_ready()
        except TimeoutError:
            return False
        finally:
            await channel.close()
        return True

    async def close(self, grace: float | None = None) -> None:
        # Closed here, since a task that is cancelled before its first step does nothing.
        for task, replaced in list(self._retiring.items()):
            task.cancel()
            await replaced.channel.close()
        await self._present.channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._present.channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._present.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._present.channel.channel_ready()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.stream_stream(*args, **options))

    def _method(self, make: Callable[[grpc.aio.Channel], Any]) -> _Method:
        method = _Method(make)
        method.bind(self._present)
        self._methods.add(method)
        return method

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()
