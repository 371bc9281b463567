"""Calls of DeliveryService, as the generated stub makes them, but chunks are read without copying them.

protobuf copies the bytes of a chunk twice, each time into newly mapped memory: 0.5 ms of processor time for 1 MiB
(measured with benchmarks/fetch.py), five times as much as hashing it. The data of a chunk is the largest field and may
stand anywhere; where it is the last one, as our controller writes it, all before it is left to protobuf, and the data
is a view of the message as it came. Whatever looks otherwise is left to protobuf as a whole.
"""

from dataclasses import dataclass

import grpc.aio

from protos.artifacts.v1 import artifacts_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["DeliveryService"].full_name
# Wire types of protobuf's encoding.
_VARINT, _LEN = 0, 2
_CHUNK_TAG = pb.FetchChunksReply.CHUNK_FIELD_NUMBER << 3 | _LEN
_DATA_TAG = pb.EncodedChunk.DATA_FIELD_NUMBER << 3 | _LEN
_MAX_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True)
class CarriedChunk:
    """An EncodedChunk whose `data` stands beside it."""

    header: pb.EncodedChunk
    data: memoryview


Reply = pb.FetchChunksReply | CarriedChunk


class DeliveryCallsOverGrpc:
    """What an agent calls of DeliveryService, over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.FetchManifest: grpc.aio.UnaryUnaryMultiCallable[pb.FetchManifestRequest, pb.FetchManifestReply]
        self.FetchManifest = channel.unary_unary(
            f"/{_SERVICE}/FetchManifest",
            request_serializer=pb.FetchManifestRequest.SerializeToString,
            response_deserializer=pb.FetchManifestReply.FromString,
        )
        self.FetchChunks: grpc.aio.UnaryStreamMultiCallable[pb.FetchChunksRequest, Reply]
        self.FetchChunks = channel.unary_stream(
            f"/{_SERVICE}/FetchChunks",
            request_serializer=pb.FetchChunksRequest.SerializeToString,
            response_deserializer=reply_from,
        )


def reply_from(message: bytes) -> Reply:
    """Return a reply; its chunk is a view of `message` where that is possible.

    Raises:
        google.protobuf.message.DecodeError: it is none; gRPC makes an error of the call of that.
    """
    try:
        at = _data_of_chunk(message)
    except IndexError:  # It ends within a number.
        at = None
    if at is None:
        return pb.FetchChunksReply.FromString(message)
    header_from, header_to, data_from = at
    return CarriedChunk(pb.EncodedChunk.FromString(message[header_from:header_to]), memoryview(message)[data_from:])


def _data_of_chunk(message: bytes) -> tuple[int, int, int] | None:
    """Return where the fields before the data begin and end, and where the data does; None when it is not the last."""
    tag, at = _varint(message, 0)
    size_bytes, at = _varint(message, at)
    if tag != _CHUNK_TAG or at + size_bytes != len(message):
        return None
    header_from = at
    while at < len(message):
        field_from = at
        tag, at = _varint(message, at)
        if tag & 7 not in (_VARINT, _LEN):
            return None
        number, at = _varint(message, at)
        if tag == _DATA_TAG:
            return (header_from, field_from, at) if at + number == len(message) else None
        if tag & 7 == _LEN:
            at += number
    return None


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number in base 128, lowest digit first, that stands at `at`, and where it ends."""
    number = 0
    for digit in range(_MAX_VARINT_BYTES):
        byte = message[at + digit]
        number |= (byte & 0x7F) << 7 * digit
        if byte < 0x80:
            return number, at + digit + 1
    raise IndexError("a number of more than 64 bits")
