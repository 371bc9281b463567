"""Transfers: what an agent may have, in which form, and what happens when nothing is prepared."""

import asyncio
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from controller.api.delivery_grpc import reply_bytes
from controller.transfer.model import Codec, Encoded, Variant
from controller.transfer.preparation import Preparations, Readiness
from controller.transfer.service import ChunkOrder, Sent, Transfers
from core.clock import SystemClock
from core.digest import Digest, digest_of
from core.errors import Forbidden, InvalidRequest, PermissionRequired, Unavailable
from core.ids import AgentId
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.delivery_server import Depot
from tests.support.delivery_shelf import chunk_contents
from tests.support.variants import made_variant

AGENT = AgentId("gate-1")
OLD = made_variant({"model.onnx": bytes(range(250)) * 8}, chunk_bytes=500)
NEW = made_variant({"model.onnx": bytes(range(250)) * 7 + bytes(250)}, version=2, chunk_bytes=500)
# No two chunks alike, and the last of each file is short.
VARIED = made_variant(
    {"model.onnx": b"graph" * 3, "w.bin": random.Random(1).randbytes(1_234), "x.bin": random.Random(2).randbytes(777)},
    version=4,
    chunk_bytes=500,
)
OLDER = made_variant({"model.onnx": bytes(range(250)) * 6 + bytes(500)}, version=3, chunk_bytes=500)
EVERYTHING = ((0, 4),)


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    depot = Depot(tmp_path)
    depot.publish(OLD, AGENT)
    depot.publish(NEW, AGENT)
    return depot


@pytest.fixture
async def transfers(depot: Depot) -> AsyncIterator[Transfers]:
    with ThreadPoolExecutor(1) as disk:
        transfers = depot.transfers(disk)
        preparing = asyncio.create_task(transfers.run())
        yield transfers
        preparing.cancel()
        await asyncio.wait([preparing])


async def fetched(transfers: Transfers, order: ChunkOrder) -> list[Sent]:
    """Return copies: a chunk is lent only until the next one is asked for."""
    async with transfers.transfer(AGENT, order) as (grant, chunks):
        assert grant.not_before is None
        return [replace(sent, encoded=replace(sent.encoded, data=bytes(sent.encoded.data))) async for sent in chunks]


async def test_what_is_not_desired_is_forbidden(transfers: Transfers) -> None:
    with pytest.raises(Forbidden, match="deploy it there first"):
        await transfers.manifest(AgentId("gate-2"), OLD.digest)


async def test_the_manifest_comes_as_it_was_published(transfers: Transfers) -> None:
    assert digest_of(await transfers.manifest(AGENT, OLD.digest)) == OLD.digest


@pytest.mark.parametrize("is_in_memory", [True, False])
async def test_chunks_without_packs_come_as_they_are(
    transfers: Transfers, depot: Depot, monkeypatch: pytest.MonkeyPatch, is_in_memory: bool
) -> None:
    if not is_in_memory:
        # No file system says that of its own accord.
        monkeypatch.setattr(transfers, "_cached_chunk", lambda *_: None)
    depot.packs.failure = Unavailable("disk full")
    depot.publish(VARIED, AGENT)
    contents = chunk_contents(VARIED)
    assert len({len(content) for content in contents}) > 1

    sent = await fetched(transfers, ChunkOrder(VARIED.digest, ((1, len(contents) - 1),)))

    assert [(each.index, each.encoded) for each in sent] == [
        (index, Encoded(Codec.RAW, contents[index])) for index in range(1, len(contents))
    ]


async def test_chunks_come_as_differences_to_what_the_agent_holds(transfers: Transfers, depot: Depot) -> None:
    sent = await fetched(transfers, ChunkOrder(NEW.digest, EVERYTHING, (OLD.digest,)))
    assert {each.encoded.source_manifest for each in sent} >= {OLD.digest}
    assert depot.packs.prepared == [(NEW.digest, (OLD.digest,))]


async def test_a_pair_is_prepared_once(transfers: Transfers, depot: Depot) -> None:
    for _ in range(3):
        await fetched(transfers, ChunkOrder(NEW.digest, EVERYTHING, (OLD.digest,)))
    assert len(depot.packs.prepared) == 1


async def test_manifests_that_nobody_knows_are_no_base(transfers: Transfers, depot: Depot) -> None:
    unknown = digest_of(b"unknown")
    weights = Digest(OLD.manifest.files[0].digest)
    await fetched(transfers, ChunkOrder(NEW.digest, EVERYTHING, (unknown, weights)))
    assert depot.packs.prepared == [(NEW.digest, ())]


@pytest.mark.parametrize("ranges", [((0, 5),), ((2, 1), (1, 1)), ((0, 0),), ((0, 2), (1, 1)), ((4, 1),)])
async def test_ranges_that_make_no_sense_are_refused(transfers: Transfers, ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InvalidRequest, match="ranges: expected"):
        await fetched(transfers, ChunkOrder(OLD.digest, ranges))


async def test_an_agent_that_takes_only_differences_is_told_what_whole_chunks_cost(transfers: Transfers) -> None:
    with pytest.raises(PermissionRequired, match="whole chunks take 2000 bytes"):
        await fetched(transfers, ChunkOrder(OLD.digest, EVERYTHING, is_delta_only=True))


async def test_differences_that_could_not_be_prepared_need_no_persons_word(transfers: Transfers, depot: Depot) -> None:
    depot.packs.failure = Unavailable("disk full")
    order = ChunkOrder(NEW.digest, EVERYTHING, (OLD.digest,), is_delta_only=True)
    with pytest.raises(Unavailable, match="come back later"):
        await fetched(transfers, order)


async def test_who_holds_nothing_needs_a_persons_word_however_preparing_went(
    transfers: Transfers, depot: Depot
) -> None:
    depot.packs.failure = Unavailable("disk full")
    with pytest.raises(PermissionRequired, match="whole chunks take 2000 bytes"):
        await fetched(transfers, ChunkOrder(NEW.digest, EVERYTHING, is_delta_only=True))


async def test_one_difference_that_could_not_be_prepared_leaves_the_question_open(
    transfers: Transfers, depot: Depot
) -> None:
    depot.publish(OLDER, AGENT)
    depot.packs.useless.add(OLD.digest)
    depot.packs.failures[OLDER.digest] = Unavailable("disk full")
    order = ChunkOrder(NEW.digest, EVERYTHING, (OLD.digest, OLDER.digest), is_delta_only=True)
    with pytest.raises(Unavailable, match="come back later"):
        await fetched(transfers, order)


async def test_a_variant_is_known_by_the_digest_that_it_came_with(depot: Depot) -> None:
    # Computing it takes most of a second when there are many chunks.
    preparations = Preparations(depot.packs, clock=SystemClock())
    running = asyncio.create_task(preparations.run())
    named = Variant(digest_of(b"another"), NEW.manifest)
    for _ in range(2):
        assert await preparations.ready(named, (), wait_s=5) is Readiness.READY
    preparations.forget(named.digest)
    assert await preparations.ready(named, (), wait_s=5) is Readiness.READY
    assert len(depot.packs.prepared) == 2
    running.cancel()
    await asyncio.wait([running])


async def test_differences_to_what_a_deployment_replaces_are_prepared_before_anybody_asks(
    transfers: Transfers, depot: Depot
) -> None:
    ahead = asyncio.create_task(transfers.run_ahead())
    transfers.prepare_ahead(digest_of(b"not here"), [OLD.digest])
    transfers.prepare_ahead(NEW.digest, [OLD.digest])
    async with asyncio.timeout(5):
        while not depot.packs.prepared:
            await asyncio.sleep(0.001)
    assert depot.packs.prepared == [(NEW.digest, (OLD.digest,))]
    ahead.cancel()
    await asyncio.wait([ahead])


async def test_deployments_in_a_rush_do_not_heap_up(transfers: Transfers, depot: Depot) -> None:
    for _ in range(1000):
        transfers.prepare_ahead(NEW.digest, [OLD.digest])
    await fetched(transfers, ChunkOrder(NEW.digest, EVERYTHING, (OLD.digest,)))
    assert len(depot.packs.prepared) == 1


async def test_while_it_is_prepared_an_agent_is_told_to_come_back(depot: Depot) -> None:
    # Nobody runs the preparations.
    with ThreadPoolExecutor(1) as disk:
        transfers = depot.transfers(disk, prepare_wait_s=0.01)
        async with transfers.transfer(AGENT, ChunkOrder(OLD.digest, EVERYTHING)) as (grant, chunks):
            assert grant.not_before is not None
            assert [sent async for sent in chunks] == []


@pytest.mark.parametrize("size_bytes", [1, 127, 128, 16_384, 1 << 20])
def test_a_chunk_reads_as_the_message_that_the_protocol_names(size_bytes: int) -> None:
    encoded = Encoded(Codec.DIFFERENCE, b"x" * size_bytes, OLD.digest, 7)
    found = pb.FetchChunksReply.FromString(reply_bytes(Sent(300, encoded)))
    assert found.chunk == pb.EncodedChunk(
        index=300, codec=pb.CODEC_DIFFERENCE, data=bytes(encoded.data), source_manifest=OLD.digest, source_index=7
    )
