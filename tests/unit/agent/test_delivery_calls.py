"""Replies read without copying their chunk are what protobuf reads, whatever the bytes."""

import random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from controller.api.delivery_grpc import reply_bytes
from controller.transfer.model import Codec, Encoded
from controller.transfer.service import Sent
from core.digest import digest_of
from edge_agent.sync.calls import CarriedChunk, Reply, reply_from
from protos.artifacts.v1 import artifacts_pb2 as pb

DATA = random.Random(1).randbytes(300)
CHUNK = pb.EncodedChunk(
    index=300, codec=pb.CODEC_DIFFERENCE, source_manifest=digest_of(b"held"), source_index=7, data=DATA
)


def as_protobuf(reply: Reply) -> pb.FetchChunksReply:
    if isinstance(reply, pb.FetchChunksReply):
        return reply
    found = pb.FetchChunksReply(chunk=reply.header)
    found.chunk.data = bytes(reply.data)
    return found


def outcome(read: object, message: bytes) -> object:
    assert callable(read)
    try:
        return as_protobuf(read(message))
    except DecodeError:
        return DecodeError


def test_what_our_controller_sends_is_not_copied() -> None:
    sent = Sent(300, Encoded(Codec.DIFFERENCE, DATA, source_manifest=digest_of(b"held"), source_index=7))
    reply = reply_from(reply_bytes(sent))
    assert isinstance(reply, CarriedChunk)
    assert reply.data == DATA
    assert as_protobuf(reply) == pb.FetchChunksReply(chunk=CHUNK)


def test_fields_in_the_order_of_protobuf_are_read_too() -> None:
    reply = reply_from(pb.FetchChunksReply(chunk=CHUNK).SerializeToString())
    assert as_protobuf(reply) == pb.FetchChunksReply(chunk=CHUNK)


def test_a_grant_is_read() -> None:
    reply = pb.FetchChunksReply(grant=pb.Grant(bytes_per_s=5))
    assert reply_from(reply.SerializeToString()) == reply


@pytest.mark.parametrize("size_bytes", range(1, 40))
def test_a_reply_that_is_cut_short_is_refused(size_bytes: int) -> None:
    message = reply_bytes(Sent(300, Encoded(Codec.RAW, DATA)))
    with pytest.raises(DecodeError):
        reply_from(message[:size_bytes])


@given(st.data())
def test_any_damage_is_read_as_protobuf_reads_it(drawn: st.DataObject) -> None:
    message = bytearray(reply_bytes(Sent(300, Encoded(Codec.RAW, DATA))))
    for at in drawn.draw(st.lists(st.integers(0, 15), max_size=4)):
        message[at] = drawn.draw(st.integers(0, 255))
    assert outcome(reply_from, bytes(message)) == outcome(pb.FetchChunksReply.FromString, bytes(message))


@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_protobuf_reads_them(message: bytes) -> None:
    assert outcome(reply_from, message) == outcome(pb.FetchChunksReply.FromString, message)
