"""A port that asks for certificates, as the controller's main one does: echoes bytes, and remembers who called."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc
import grpc.aio

from core.addresses import Address
from core.grpc_transport import SERVER_OPTIONS, TlsIdentity

HOST = "127.0.0.1"
SERVICE = "test.Echo"
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


def certificate_of(context: Context) -> bytes:
    """Return the caller's certificate in PEM."""
    return next(iter(context.auth_context()["x509_pem_cert"]))


class EchoPort:
    """`callers` are the certificates of those who called, in PEM; a stream stays open until its caller ends it."""

    def __init__(self) -> None:
        self.callers: list[bytes] = []
        self.called = asyncio.Event()
        self.stream_ended = asyncio.Event()
        # A call with this content is answered when `released` is set.
        self.released = asyncio.Event()

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "UnaryUnary": grpc.unary_unary_rpc_method_handler(self._unary_unary),
                "UnaryStream": grpc.unary_stream_rpc_method_handler(self._unary_stream),
                "StreamUnary": grpc.stream_unary_rpc_method_handler(self._stream_unary),
                "StreamStream": grpc.stream_stream_rpc_method_handler(self._stream_stream),
            },
        )

    def _note(self, context: Context) -> None:
        self.callers.append(certificate_of(context))
        self.called.set()

    async def _unary_unary(self, request: bytes, context: Context) -> bytes:
        self._note(context)
        if request == b"wait":
            await self.released.wait()
        return request

    async def _unary_stream(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        self._note(context)
        yield request

    async def _stream_unary(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        self._note(context)
        return b"".join([request async for request in requests])

    async def _stream_stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        self._note(context)
        try:
            async for request in requests:
                yield request
        finally:
            self.stream_ended.set()


@asynccontextmanager
async def mutual_port(shown: TlsIdentity, *handlers: grpc.GenericRpcHandler, port: int = 0) -> AsyncIterator[Address]:
    """Yield where `handlers` are served to callers certified by an authority in the bundle of `shown`."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers(handlers)
    credentials = grpc.ssl_server_credentials(
        [(shown.private_key, shown.certificate_chain)], shown.trust_bundle, require_client_auth=True
    )
    bound = server.add_secure_port(f"{HOST}:{port}", credentials)
    await server.start()
    try:
        yield Address(HOST, bound)
    finally:
        await server.stop(None)
