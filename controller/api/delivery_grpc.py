"""DeliveryService: manifests and chunks to agents, each to its own; see `controller.transfer.service` for the rules."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from controller.transfer.model import Codec
from controller.transfer.service import MAX_HELD, ChunkOrder, Grant, Sent, Transfers
from core.digest import parse_digest
from core.errors import DeadlineExceeded, InvalidRequest, NanofleetError, PermissionRequired
from core.ids import AgentId
from core.status import STATUS
from protos.artifacts.v1 import artifacts_pb2 as pb

# Chosen: 1 MiB in two minutes is 9 kB/s; slower receivers ask for the rest instead of holding a stream.
SEND_TIMEOUT_S = 120.0
# Chosen: how long a transfer, or one chunk of it, may last while others are told to come back; to resume costs little.
SHARE_S = 60.0
# Derived: as many as a manifest can list chunks with gaps between them.
MAX_RANGES = 1 << 16

# While a chunk waits for its turn: what is silent is gone.
_STILL_HERE = pb.FetchChunksReply()

_CODECS = {Codec.RAW: pb.CODEC_RAW, Codec.ZSTD: pb.CODEC_ZSTD, Codec.DIFFERENCE: pb.CODEC_DIFFERENCE}

Context = grpc.aio.ServicerContext[Any, Any]


class DeliveryServicer:
    """Served by `add_delivery_to_server`.

    `caller_of` raises when no agent calls, and what it returns says which agent does, or raises when it may not call
    any more. That is asked before every chunk: a stream lasts for hours, and whoever is banned meanwhile gets no more.
    """

    def __init__(
        self,
        transfers: Transfers,
        *,
        caller_of: Callable[[Context], Callable[[], AgentId]],
        send_timeout_s: float = SEND_TIMEOUT_S,
        share_s: float = SHARE_S,
    ) -> None:
        self._transfers = transfers
        self._caller_of = caller_of
        self._send_timeout_s = send_timeout_s
        self._share_s = share_s

    async def FetchManifest(  # noqa: N802  # named by the protocol
        self, request: pb.FetchManifestRequest, context: Context
    ) -> pb.FetchManifestReply:
        try:
            content = await self._transfers.manifest(self._caller_of(context)(), parse_digest(request.digest))
        except NanofleetError as error:
            await context.abort(_status(error), str(error))
        return pb.FetchManifestReply(content=content)

    async def FetchChunks(self, request: pb.FetchChunksRequest, context: Context) -> None:  # noqa: N802
        """Stream chunks; ends, its share given back, when the client leaves: gRPC then cancels this task."""
        try:
            admitted = self._caller_of(context)
            async with self._transfers.transfer(admitted(), _order(request)) as (grant, chunks):
                await context.write(pb.FetchChunksReply(grant=_grant(grant)))
                await self._send(chunks, context, admitted)
        except NanofleetError as error:
            await context.abort(_status(error), str(error))

    async def _send(self, chunks: AsyncIterator[Sent], context: Context, admitted: Callable[[], AgentId]) -> None:
        """Write every chunk in its turn; each is lent, so none is read before the one before it is written."""
        agent_id = admitted()
        on_wait = partial(self._write, _STILL_HERE, context)
        ends_at_s = asyncio.get_running_loop().time() + self._share_s
        async for sent in chunks:
            if self._transfers.is_crowded and asyncio.get_running_loop().time() > ends_at_s:
                await self._write(pb.FetchChunksReply(grant=_grant(self._transfers.recall())), context)
                return
            async with self._transfers.turn(agent_id, sent, on_wait=on_wait):
                admitted()
                await self._write(sent, context)

    async def _write(self, reply: "pb.FetchChunksReply | Sent", context: Context) -> None:
        timeout_s = self._send_timeout_s
        if self._transfers.is_crowded:
            timeout_s = min(timeout_s, self._share_s)
        try:
            async with asyncio.timeout(timeout_s):
                await context.write(reply)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"expected the receiver to take a chunk within {timeout_s:g} s; ask for the rest"
            ) from error


def add_delivery_to_server(servicer: DeliveryServicer, server: grpc.aio.Server) -> None:
    """Serve DeliveryService; takes the place of the generated function, whose serializer copies too much."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "FetchManifest": grpc.unary_unary_rpc_method_handler(
            servicer.FetchManifest,
            request_deserializer=pb.FetchManifestRequest.FromString,
            response_serializer=pb.FetchManifestReply.SerializeToString,
        ),
        "FetchChunks": grpc.unary_stream_rpc_method_handler(
            servicer.FetchChunks,
            request_deserializer=pb.FetchChunksRequest.FromString,
            response_serializer=reply_bytes,
        ),
    }
    service = pb.DESCRIPTOR.services_by_name["DeliveryService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))


def _order(request: pb.FetchChunksRequest) -> ChunkOrder:
    if len(request.held_manifests) > MAX_HELD:
        raise InvalidRequest(f"held_manifests: expected at most {MAX_HELD}, got {len(request.held_manifests)}")
    if len(request.ranges) > MAX_RANGES:
        raise InvalidRequest(f"ranges: expected at most {MAX_RANGES}, got {len(request.ranges)}")
    return ChunkOrder(
        parse_digest(request.manifest_digest),
        tuple((each.first, each.count) for each in request.ranges),
        tuple(dict.fromkeys(parse_digest(text) for text in request.held_manifests)),
        request.delta_only,
    )


def _grant(grant: Grant) -> pb.Grant:
    found = pb.Grant(bytes_per_s=grant.bytes_per_s)
    if grant.not_before is not None:
        instant = Timestamp()
        instant.FromDatetime(grant.not_before)
        found.not_before.CopyFrom(instant)
    return found


def reply_bytes(reply: "pb.FetchChunksReply | Sent") -> bytes:
    """Return the bytes of a reply; those of a chunk are put together by hand, its fields in another order.

    protobuf copies the chunk three times on the way, each time into newly mapped memory: 2.9 ms for 1 MiB, against
    0.03 ms here (measured), more than everything else that sending it takes.
    """
    if isinstance(reply, pb.FetchChunksReply):
        return reply.SerializeToString()
    encoded = reply.encoded
    header = pb.EncodedChunk(
        index=reply.index,
        codec=_CODECS[encoded.codec],
        source_manifest=encoded.source_manifest or "",
        source_index=encoded.source_index,
    ).SerializeToString()
    field = header + _DATA_TAG + _varint(len(encoded.data))
    return b"".join((_CHUNK_TAG, _varint(len(field) + len(encoded.data)), field, encoded.data))


def _tag(number: int) -> bytes:
    """Return what stands before a field of bytes or a message: protobuf encoding, wire type LEN."""
    return _varint(number << 3 | 2)


def _varint(number: int) -> bytes:
    """Return a number in base 128, the lowest digit first."""
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


_CHUNK_TAG = _tag(pb.FetchChunksReply.CHUNK_FIELD_NUMBER)
_DATA_TAG = _tag(pb.EncodedChunk.DATA_FIELD_NUMBER)


def _status(error: NanofleetError) -> grpc.StatusCode:
    """Return the status of an error: artifacts.proto tells a missing permission from an order that is not one's own."""
    return grpc.StatusCode.FAILED_PRECONDITION if isinstance(error, PermissionRequired) else STATUS[error.code].grpc
