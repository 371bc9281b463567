"""Faults of transfers, by their ids in the delivery design: links, servers, disks and devices that go wrong."""

import asyncio
import errno
import os
import random
import resource
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from controller.demo.ports import free_port
from controller.transfer.fairness import FairSender, SendLimits
from controller.transfer.model import Codec, Encoded
from core.chunks import chunks_of
from core.clock import SystemClock
from core.delta import compress
from core.digest import digest_of
from core.errors import (
    DiskFull,
    Forbidden,
    IntegrityError,
    NanofleetError,
    NotFound,
    PermissionRequired,
    Unavailable,
)
from core.fleet_state import Transfer
from core.ids import AgentId, ModelName
from edge_agent.reconcile.attempts import Attempts, RetryPolicy
from edge_agent.sync.source import ComeBackLater
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.delivery_server import Depot, Device, device, serving, serving_shelf
from tests.support.delivery_shelf import DeliveryShelf, Fault, Silence
from tests.support.variants import MadeVariant, made_variant

CHUNK_BYTES = 64 << 10
WEIGHTS = random.Random(1).randbytes(20 * CHUNK_BYTES)
# A byte in every 64 differs, as after a little training.
TRAINED = bytes(byte ^ (at % 64 == 0) for at, byte in enumerate(WEIGHTS))
OLD = made_variant({"model.onnx": WEIGHTS}, chunk_bytes=CHUNK_BYTES)
NEW = made_variant({"model.onnx": TRAINED}, version=2, chunk_bytes=CHUNK_BYTES)


async def until_whole(there: Device, variant: MadeVariant, *, attempts: int) -> int:
    """Try as an agent does; return how many attempts it took."""
    for attempt in range(1, attempts + 1):
        try:
            await there.bring(variant)
        except (Unavailable, IntegrityError):
            continue
        return attempt
    raise AssertionError(f"not whole after {attempts} attempts")


async def nothing() -> None:
    pass


def drop_after(chunks: int) -> Fault:
    return lambda replies: [*replies[: chunks + 1], Unavailable("link reset")]


async def test_D01_a_link_that_drops_and_heals_costs_no_chunk_twice(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)
    shelf.faults.extend(drop_after(arrived) for arrived in (3, 4, 5))
    async with serving_shelf(shelf) as port, device(tmp_path, port) as there:
        assert await until_whole(there, OLD, attempts=4) == 4
    assert [chunks[0] for chunks in shelf.asked_chunks] == [0, 3, 7, 12]


async def test_D01_a_controller_that_dies_in_the_middle_and_comes_back_is_resumed(tmp_path: Path) -> None:
    port = free_port()
    shelf = DeliveryShelf(OLD)
    shelf.faults.append(lambda replies: [*replies[:9], Silence()])
    async with device(tmp_path, port) as there:
        async with serving_shelf(shelf, port=port):
            bringing = asyncio.create_task(there.bring(OLD))
            while not shelf.asked or shelf.faults:
                await asyncio.sleep(0.01)
            assembly_bytes = 0
            while assembly_bytes < 8 * CHUNK_BYTES:
                await asyncio.sleep(0.01)
                assembly_bytes = there.store.stored_bytes(OLD.manifest)
        with pytest.raises(Unavailable):
            await bringing
        async with serving_shelf(shelf, port=port):
            await until_whole(there, OLD, attempts=20)
    assert shelf.asked_chunks[-1] == list(range(8, 20))


async def test_D01_an_uplink_that_others_use_up_is_no_silence(tmp_path: Path, depot: Depot) -> None:
    depot.sender = FairSender(SendLimits(in_flight_bytes=1, patience_s=60.0, word_s=0.02), clock=SystemClock())
    async with serving(depot), device(tmp_path / "device", depot.port, timeout_s=0.5) as there:
        async with depot.sender.turn(AgentId("gate-2"), 1, on_wait=nothing):
            bringing = asyncio.create_task(there.bring(OLD))
            # More than an agent bears without a word.
            await asyncio.sleep(1.0)
        await bringing
        assert there.store.is_complete(OLD.digest)


async def test_D02_a_server_that_fails_every_second_request_is_got_through(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)
    for number in range(6):
        shelf.faults.append(
            (lambda replies: [Unavailable("every second")]) if number % 2 else (lambda replies: replies[:6])
        )
    async with serving_shelf(shelf) as port, device(tmp_path, port) as there:
        await until_whole(there, OLD, attempts=9)
        assert there.store.blob_path(digest_of(WEIGHTS)).read_bytes() == WEIGHTS


async def test_D03_a_variant_that_is_not_found_is_given_up_at_once(tmp_path: Path) -> None:
    attempts = Attempts(RetryPolicy())
    async with serving_shelf(DeliveryShelf()) as port, device(tmp_path, port) as there:
        with pytest.raises(NotFound) as caught:
            await there.bring(OLD)
    attempts.failed(ModelName("digits"), caught.value, now_s=0.0)
    assert ModelName("digits") in attempts.given_up


async def test_D03_an_agent_that_is_told_to_come_back_much_later_can_be_stopped(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)
    is_asked = asyncio.Event()

    def put_off(replies: list[pb.FetchChunksReply]) -> list[pb.FetchChunksReply]:
        replies[0].grant.not_before.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
        is_asked.set()
        return replies[:1]

    shelf.faults.append(put_off)
    async with serving_shelf(shelf) as port, device(tmp_path, port) as there:
        bringing = asyncio.create_task(there.bring(OLD))
        await is_asked.wait()
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing
    assert len(shelf.asked) == 1


async def test_D05_a_corrupt_chunk_is_refused_and_only_what_is_missing_is_asked_for_again(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)

    def corrupt(replies: list[pb.FetchChunksReply]) -> list[pb.FetchChunksReply]:
        replies[8].chunk.data = bytes(CHUNK_BYTES)
        return replies

    shelf.faults.append(corrupt)
    async with serving_shelf(shelf) as port, device(tmp_path, port) as there:
        with pytest.raises(IntegrityError, match="chunk 7"):
            await there.bring(OLD)
        await there.bring(OLD)
        assert there.store.blob_path(digest_of(WEIGHTS)).read_bytes() == WEIGHTS
    assert shelf.asked_chunks[1][0] == 7


async def test_D06_a_stream_that_ends_early_without_an_error_is_not_taken_for_whole(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)
    shelf.faults.append(lambda replies: replies[:-1])
    async with serving_shelf(shelf) as port, device(tmp_path, port) as there:
        with pytest.raises(Unavailable, match="ended before chunk 19"):
            await there.bring(OLD)
        assert not there.store.is_complete(OLD.digest)
        assert not there.store.has(digest_of(WEIGHTS))


async def test_D07_a_variant_larger_than_what_is_free_is_refused_with_both_numbers(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)
    async with serving_shelf(shelf) as port, device(tmp_path, port, free_bytes=lambda _: 1000) as there:
        with pytest.raises(DiskFull, match=f"needs {len(WEIGHTS)} bytes .* 1000 are free"):
            await there.bring(OLD)
    assert shelf.asked == []


async def test_D07_a_disk_that_turns_out_full_is_told_as_such(tmp_path: Path) -> None:
    # What is free is a guess where others write too: the disk itself has the last word.
    limit_bytes = len(WEIGHTS) // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with serving_shelf(DeliveryShelf(OLD)) as port, device(tmp_path, port) as there:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
        try:
            with pytest.raises(DiskFull, match=os.strerror(errno.EFBIG)):
                await there.bring(OLD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        await there.bring(OLD)
        assert there.store.is_complete(OLD.digest)


async def test_D09_a_manifest_that_cannot_be_written_leaves_nothing_and_can_be_had_later(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with serving_shelf(DeliveryShelf(OLD)) as port, device(tmp_path, port) as there:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises((NanofleetError, OSError)):
                await there.bring(OLD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not there.store.has(OLD.digest)
        await there.bring(OLD)
        assert there.store.is_complete(OLD.digest)


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    (tmp_path / "controller").mkdir()
    depot = Depot(tmp_path / "controller")
    depot.publish(OLD, "gate-1")
    depot.publish(NEW, "gate-1")
    return depot


async def brought(there: Device, variant: MadeVariant) -> Transfer:
    costs: list[Transfer] = []
    await there.delivery.variant(variant.digest, lambda _stored, _total, transfer: costs.append(transfer))
    assert there.store.blob_path(digest_of(TRAINED)).read_bytes() == TRAINED
    return costs[-1]


async def test_D11_a_base_that_changed_on_the_disk_costs_only_its_chunks_in_full(tmp_path: Path, depot: Depot) -> None:
    async with serving(depot), device(tmp_path / "device", depot.port) as there:
        await there.run(OLD)
        base = there.store.blob_path(digest_of(WEIGHTS))
        with base.open("r+b") as file:
            file.seek(3 * CHUNK_BYTES)
            file.write(b"rotten")
        cost = await brought(there, NEW)
    assert cost.difference_chunks == 20
    assert cost.raw_chunks + cost.zstd_chunks == 1
    assert cost.wire_bytes < len(TRAINED) // 4


async def test_D11_a_base_that_is_gone_costs_its_chunks_in_full(tmp_path: Path, depot: Depot) -> None:
    async with serving(depot), device(tmp_path / "device", depot.port) as there:
        await there.run(OLD)
        bring = asyncio.create_task(brought(there, NEW))
        there.store.blob_path(digest_of(WEIGHTS)).unlink()
        cost = await bring
    assert cost.raw_chunks + cost.zstd_chunks >= 20


async def test_D17_a_fetch_that_is_aborted_ends_at_once_and_what_came_is_kept(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)
    shelf.faults.append(lambda replies: [*replies[:6], Silence()])
    async with serving_shelf(shelf) as port, device(tmp_path, port) as there:
        bringing = asyncio.create_task(there.bring(OLD))
        while there.store.stored_bytes(OLD.manifest) < 5 * CHUNK_BYTES if there.store.has(OLD.digest) else True:
            await asyncio.sleep(0.01)
        bringing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bringing
        async with asyncio.timeout(5):
            while shelf.open_streams:
                await asyncio.sleep(0.01)
        await there.bring(OLD)
    assert shelf.asked_chunks[1] == list(range(5, 20))


async def test_I10_an_agent_gets_neither_manifest_nor_chunks_of_what_another_runs(tmp_path: Path, depot: Depot) -> None:
    async with serving(depot), device(tmp_path / "device", depot.port, agent="gate-2") as there:
        with pytest.raises(Forbidden, match="not in its desired state"):
            await there.source.manifest(OLD.digest)
        chunks = there.source.chunks(OLD.digest, chunks_of(OLD.manifest), held=(), is_delta_only=False)
        with pytest.raises(Forbidden, match="not in its desired state"):
            await anext(chunks)


async def test_I10_an_agent_gets_no_differences_to_what_was_never_its_own(tmp_path: Path, depot: Depot) -> None:
    depot.publish(OLD, "gate-2")
    async with serving(depot), device(tmp_path / "device", depot.port, agent="gate-2") as there:
        chunks = there.source.chunks(OLD.digest, chunks_of(OLD.manifest), held=(NEW.digest,), is_delta_only=False)
        codecs = {arrived.codec.value async for arrived in chunks}
    assert "difference" not in codecs
    assert depot.packs.prepared == [(OLD.digest, ())]


async def test_I10_an_agent_gets_differences_to_what_it_once_had(tmp_path: Path, depot: Depot) -> None:
    gate = AgentId("gate-1")
    depot.desired.wanted[gate], depot.desired.former[gate] = {NEW.digest}, {OLD.digest}
    async with serving(depot), device(tmp_path / "device", depot.port) as there:
        chunks = there.source.chunks(NEW.digest, chunks_of(NEW.manifest), held=(OLD.digest,), is_delta_only=True)
        codecs = {arrived.codec.value async for arrived in chunks}
    assert codecs == {"difference"}


async def test_I11_a_transfer_that_lasts_makes_room_when_others_wait(tmp_path: Path, depot: Depot) -> None:
    depot.max_transfers, depot.pause_s = 1, 1.0
    depot.publish(OLD, "gate-2")
    async with (
        serving(depot, share_s=0.0),
        device(tmp_path / "one", depot.port) as one,
        device(tmp_path / "two", depot.port, agent="gate-2") as two,
    ):
        # It takes one chunk and no more.
        slow = one.source.chunks(NEW.digest, chunks_of(NEW.manifest), held=(), is_delta_only=False)
        await anext(slow)
        with pytest.raises(ComeBackLater):
            await anext(two.source.chunks(OLD.digest, chunks_of(OLD.manifest), held=(), is_delta_only=False))
        with pytest.raises(ComeBackLater):
            async for _ in slow:
                pass
        await two.bring(OLD)
        assert two.store.is_complete(OLD.digest)


async def test_A20_a_poisoned_delta_costs_that_chunk_in_full_and_nothing_else(tmp_path: Path, depot: Depot) -> None:
    def poison(index: int, encoded: Encoded) -> Encoded:
        return replace(encoded, data=b"\xff" * 60) if index == 4 and encoded.codec is Codec.DIFFERENCE else encoded

    depot.packs.poison = poison
    async with serving(depot), device(tmp_path / "device", depot.port) as there:
        await there.run(OLD)
        cost = await brought(there, NEW)
    assert cost.difference_chunks == 20
    assert cost.raw_chunks + cost.zstd_chunks == 1


async def test_A20_a_frame_that_would_grow_beyond_its_chunk_is_refused(tmp_path: Path) -> None:
    shelf = DeliveryShelf(OLD)
    bomb = compress(bytes(512 << 20))

    def explode(replies: list[pb.FetchChunksReply]) -> list[pb.FetchChunksReply]:
        replies[1].chunk.codec = pb.CODEC_ZSTD
        replies[1].chunk.data = bomb
        return replies

    assert len(bomb) <= CHUNK_BYTES
    shelf.faults.append(explode)
    async with serving_shelf(shelf) as port, device(tmp_path, port) as there:
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(IntegrityError):
            await there.bring(OLD)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 << 10


async def test_A20_a_poisoned_delta_makes_a_metered_agent_ask(tmp_path: Path, depot: Depot) -> None:
    depot.packs.poison = lambda index, encoded: replace(encoded, data=b"\xff" * 60) if index == 4 else encoded
    async with serving(depot), device(tmp_path / "device", depot.port, is_metered=True) as there:
        there.delivery.allow(OLD.digest)
        depot.packs.poison, poison = lambda _index, encoded: encoded, depot.packs.poison
        await there.run(OLD)
        depot.packs.poison = poison
        with pytest.raises(PermissionRequired, match="1 differences cannot be used"):
            await there.bring(NEW)
        assert there.store.stored_bytes(NEW.manifest) == len(TRAINED) - CHUNK_BYTES
