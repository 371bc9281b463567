"""The agent's one channel to the controller, which stays the same object while its certificate is replaced.

Stubs are made once and kept. What they get from here looks up the present inner channel at every call, so a renewal
reaches all of them, and calls under way end on the channel that they began on.
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

# Chosen: a chunk or an answer arrives in it; the session, which would stay for days, is made anew after it.
REPLACED_GRACE_S = 20.0
# Derived: a certificate chain and a bundle, a few kB each, and the root of the catalogue.
_MAX_CREDENTIAL_BYTES = 1 << 20
# For the enrolment port, where only the controller shows a certificate: the peer must be the fleet's controller.
ENROLMENT_OPTIONS = [*MUTUAL_TLS_OPTIONS, ("grpc.max_receive_message_length", _MAX_CREDENTIAL_BYTES)]
# What gRPC says when a certificate does not chain to our authorities, is not for the name, or not for today.
_CERTIFICATE_FAULTS = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification")


def error_of_call(code: grpc.StatusCode, details: str | None, *, target: Address) -> NanofleetError:
    """Return what a failed call to `target` stands for; Untrusted: the peer is not the fleet's controller."""
    reason = peer_text(details or code.name)
    if code is grpc.StatusCode.UNAVAILABLE and any(fault in (details or "") for fault in _CERTIFICATE_FAULTS):
        return Untrusted(
            f"{target}: expected the fleet's controller, its certificate does not hold here; check the address and "
            f"this machine's clock, or enrol again: {reason}"
        )
    return error_from_grpc(code, f"{target}: {reason}")


class _Method:
    """One method of a stub, bound to the present inner channel."""

    __slots__ = ("__weakref__", "_make", "inner")

    def __init__(self, make: Callable[[grpc.aio.Channel], Any], channel: grpc.aio.Channel) -> None:
        self._make = make
        self.bind(channel)

    def bind(self, channel: grpc.aio.Channel) -> None:
        self.inner = self._make(channel)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


class RotatingChannel(grpc.aio.Channel):
    """To `target`; `credentials` are those of the first inner channel."""

    def __init__(
        self,
        target: Address,
        credentials: TransportCredentials | TlsIdentity,
        *,
        grace_s: float = REPLACED_GRACE_S,
    ) -> None:
        self._target = target
        self._grace_s = grace_s
        self._inner = open_channel(target, credentials)
        self._methods: weakref.WeakSet[_Method] = weakref.WeakSet()

    async def replace(self, credentials: TransportCredentials | TlsIdentity) -> None:
        """Send every call from now on over a new connection.

        The swap is done when this first waits. Then the calls on the old connection get the grace to end, and are
        cancelled with it; cancelling this cancels them at once.
        """
        old, self._inner = self._inner, open_channel(self._target, credentials)
        for method in self._methods:
            method.bind(self._inner)
        try:
            # Not close(grace): cancelled half way, that leaves a channel that can neither be used nor closed.
            await asyncio.sleep(self._grace_s)
        finally:
            await old.close()

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
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    def unary_unary(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.unary_unary(*args, **options))

    def unary_stream(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.unary_stream(*args, **options))

    def stream_unary(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.stream_unary(*args, **options))

    def stream_stream(self, *args: Any, **options: Any) -> Any:
        return self._method(lambda channel: channel.stream_stream(*args, **options))

    def _method(self, make: Callable[[grpc.aio.Channel], Any]) -> _Method:
        method = _Method(make, self._inner)
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
