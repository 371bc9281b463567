"""Escalations for later: kept over a restart, asked in order when the heavy tier is back, delivered to whom asks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from core.deadline import Deadline
from core.errors import HeavyUnavailable, InternalError, InvalidTensor, NanofleetError, UnknownModel
from core.open_inference.messages import InferRequest, InferResponse
from edge_agent.outbox.courier import Courier, Pace
from edge_agent.outbox.deferrals import DeferredReceiver, OutboxDeferrals
from edge_agent.outbox.outbox import Outbox
from edge_agent.outbox.rows import Kind, Loss, Row
from tests.support.clocks import HeldClock
from tests.support.edge_plane import UNSURE, request_of
from tests.support.outbox_values import OpenGate, open_outbox, until_rows

CLOCK = HeldClock()


class Heavy:
    """A large model that echoes; `failing` by request id."""

    def __init__(self) -> None:
        self.asked: list[InferRequest] = []
        self.failing: dict[str, NanofleetError] = {}

    async def ask(
        self, request: InferRequest, *, deadline: Deadline | None = None, traceparent: str | None = None
    ) -> InferResponse:
        self.asked.append(request)
        if request.id in self.failing:
            raise self.failing[request.id]
        return InferResponse(request.model_name, "7", request.inputs, request.id)


class Face:
    """What a face did with late verdicts."""

    def __init__(self) -> None:
        self.delivered: list[tuple[bytes, str]] = []

    def deliver(self, reply_to: bytes, response: InferResponse) -> None:
        self.delivered.append((reply_to, response.id))


@asynccontextmanager
async def sending(outbox: Outbox, heavy: Heavy, face: Face) -> AsyncIterator[None]:
    pace = Pace(max_rows=1, max_bytes=1 << 20)
    receiver = DeferredReceiver(heavy, face, clock=CLOCK)
    courier = Courier(
        Kind.ESCALATION, outbox, receiver, OpenGate(), pace=pace, clock=CLOCK, sleep=lambda _: asyncio.sleep(0)
    )
    running = asyncio.ensure_future(courier.run())
    try:
        yield
    finally:
        running.cancel()


def take(outbox: Outbox, *ids: str) -> None:
    for request_id in ids:
        request = request_of(UNSURE, model="large", request_id=request_id)
        assert OutboxDeferrals(outbox).take(request, dedupe_id=f"gate-1/cam/{request_id}", reply_to=request_id.encode())


async def test_an_escalation_survives_a_restart_and_its_verdict_finds_its_asker(tmp_path: Path) -> None:
    heavy, face = Heavy(), Face()
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        take(outbox, "a", "b")
    async with open_outbox(tmp_path, HeldClock()) as outbox, sending(outbox, heavy, face):
        await until_rows(outbox, Kind.ESCALATION, 0)

    assert face.delivered == [(b"a", "a"), (b"b", "b")]
    assert [request.model_name for request in heavy.asked] == ["large", "large"]
    assert heavy.asked[0].inputs[0].array.tolist() == request_of(UNSURE).inputs[0].array.tolist()


async def test_a_verdict_is_asked_for_again_until_the_heavy_tier_gives_one(tmp_path: Path) -> None:
    heavy, face = Heavy(), Face()
    heavy.failing = {"a": HeavyUnavailable("away")}
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        take(outbox, "a", "b")
        async with sending(outbox, heavy, face):
            async with asyncio.timeout(10):
                while len(heavy.asked) < 20:
                    await asyncio.sleep(0)
            assert face.delivered == []
            heavy.failing.clear()
            await until_rows(outbox, Kind.ESCALATION, 0)

    assert face.delivered == [(b"a", "a"), (b"b", "b")]


def broken() -> HeavyUnavailable:
    """Return what `Offload` raises over a heavy tier that breaks."""
    error = HeavyUnavailable("heavy tier: a defect")
    error.__cause__ = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata())
    return error


@pytest.mark.parametrize("fault", [InvalidTensor("no"), UnknownModel("no"), broken(), InternalError("no")])
async def test_an_escalation_that_the_heavy_tier_never_answers_is_dropped_and_does_not_block(
    tmp_path: Path, fault: NanofleetError
) -> None:
    heavy, face = Heavy(), Face()
    heavy.failing = {"a": fault}
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        take(outbox, "a", "b")
        async with sending(outbox, heavy, face):
            await until_rows(outbox, Kind.ESCALATION, 2)
            await until_rows(outbox, Kind.ESCALATION, 0)
        assert outbox.figures is not None
        assert outbox.figures.losses == {(Kind.ESCALATION, Loss.POISON): 1}

    assert face.delivered == [(b"b", "b")]


@pytest.mark.parametrize("body", [b"", b"\0\0", b"\0\0\0\x09short", b"\0\0\0\0\xff\xff\xff"])
async def test_a_row_that_was_damaged_is_refused_for_good(body: bytes) -> None:
    receiver = DeferredReceiver(Heavy(), Face(), clock=CLOCK)
    with pytest.raises(NanofleetError) as refusal:
        await receiver.send([Row(1, Kind.ESCALATION, "a", body, 0.0, 0)])

    assert not refusal.value.retryable


@pytest.mark.parametrize("privacy", ["device", "site"])
async def test_data_that_may_not_leave_is_not_kept_even_if_somebody_asks(tmp_path: Path, privacy: str) -> None:
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        request = request_of(UNSURE, model="large", request_id="secret", privacy=privacy)
        assert not OutboxDeferrals(outbox).take(request, dedupe_id="secret", reply_to=b"cam")
        take(outbox, "public")
        await until_rows(outbox, Kind.ESCALATION, 1)

    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"public" in content
    assert b"secret" not in content


async def test_without_room_an_escalation_is_not_taken(tmp_path: Path) -> None:
    async with open_outbox(tmp_path, HeldClock()) as outbox:
        large = request_of(tuple(0.0 for _ in range(300_000)), model="large")
        assert not OutboxDeferrals(outbox).take(large, dedupe_id="large", reply_to=b"cam")
