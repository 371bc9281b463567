"""A real agent that was alone: what it writes down arrives once it is back, and no state of its disk stops it."""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc.aio
import pytest

from controller.api.policy import agent_of
from controller.api.records_grpc import RecordServicer
from controller.demo.ports import free_port
from controller.records.model import EventFilter, Kept, Per, UsageFilter
from controller.records.service import Records
from core.addresses import Address
from core.clock import SystemClock
from core.fleet_state import Position, PushResult, Usage
from core.ids import AgentId
from protos.records.v1.records_pb2_grpc import add_RecordServiceServicer_to_server
from tests.support.catalogue_side import released
from tests.support.delivery_shelf import DeliveryShelf
from tests.support.enrolled import Realm
from tests.support.fake_controller import FakeController, running_controller
from tests.support.local_agent import AgentProcess
from tests.support.onnx_models import dense_net
from tests.support.record_store import MemoryRecordStore
from tests.support.variants import made_variant

LIGHT = released(made_variant({"model.onnx": dense_net().SerializeToString()}), release_counter=1)
AGENT = AgentId("gate-1")
TIMEOUT_S = 20.0
# Nobody else comes back here, and tests do not wait for a fleet.
HASTE = {
    "NANOFLEET_AGENT_OUTBOX__SPREAD_S": "0",
    "NANOFLEET_AGENT_OUTBOX__INTERVAL_S": "0.05",
    "NANOFLEET_AGENT_OUTBOX__RETRY_BASE_S": "0.05",
    "NANOFLEET_AGENT_OUTBOX__PROBE_FIRST_S": "0.1",
    # A disk that is nearly full is none of these tests' business.
    "NANOFLEET_AGENT_OUTBOX__MIN_FREE_BYTES": "0",
}


class Side:
    """The records of a controller, and an agent that knows where it is to be found."""

    def __init__(self, folder: Path) -> None:
        self.realm = Realm()
        self.realm.release(LIGHT)
        kept = Kept(1000, 1000, timedelta(days=400))
        self.records = Records(MemoryRecordStore(), clock=SystemClock(), kept=kept)
        self.port = free_port()
        address = Address("127.0.0.1", self.port)
        self.agent = AgentProcess(folder, realm=self.realm, controller=address, environment=HASTE)

    def serve(self, server: grpc.aio.Server) -> None:
        add_RecordServiceServicer_to_server(RecordServicer(self.records, agent_of=agent_of), server)

    def controller(self) -> AbstractAsyncContextManager[FakeController]:
        return running_controller(self.realm, DeliveryShelf(LIGHT), port=self.port, serve=self.serve)

    async def give_model(self) -> None:
        async with self.controller() as controller:
            await self.agent.start()
            await controller.fleet.push(LIGHT, generation=1)
            expected = PushResult(Position(1, 1))
            await controller.fleet.until(lambda: expected in controller.fleet.results)

    async def usage(self) -> Usage | None:
        today = datetime.now(UTC).date()
        found = await self.records.usage(UsageFilter(today - timedelta(days=2), today, Per.FLEET))
        return found[0].usage if found else None

    async def events(self) -> list[str]:
        page = await self.records.events(EventFilter(AGENT, 100))
        return [event.action for event in page.events]


@pytest.fixture
async def side(tmp_path: Path) -> AsyncIterator[Side]:
    made = Side(tmp_path)
    yield made
    await made.agent.kill()


async def until(claim: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not claim():
            await asyncio.sleep(0.02)


async def test_what_happened_while_the_controller_was_away_arrives_once(side: Side) -> None:
    await side.give_model()
    # Alone from here on, over a restart.
    for _ in range(3):
        await side.agent.ask()
    assert await side.agent.stop() == 0
    await side.agent.start()
    await until(side.agent.status)
    for _ in range(2):
        await side.agent.ask()
    await side.agent.stop()
    await side.agent.start()
    async with side.controller():
        async with asyncio.timeout(TIMEOUT_S):
            while await side.usage() != Usage(5, 0, 0, 0) or "variant.activated" not in await side.events():
                await asyncio.sleep(0.05)
    async with side.controller():
        await side.agent.stop()
        await side.agent.start()
        await until(lambda: side.agent.status().controller.is_connected)
        assert await side.usage() == Usage(5, 0, 0, 0)


async def test_a_damaged_outbox_is_set_aside_and_the_agent_answers_and_tells(side: Side) -> None:
    await side.give_model()
    await side.agent.stop()
    outbox = side.agent.state_dir / "outbox.sqlite"
    content = bytearray(outbox.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    outbox.write_bytes(bytes(content))
    await side.agent.start()
    assert await side.agent.answers()
    assert len(list(side.agent.state_dir.glob("outbox.corrupt-*"))) == 1
    async with side.controller(), asyncio.timeout(TIMEOUT_S):
        while "outbox.corrupt" not in await side.events():
            await asyncio.sleep(0.05)


async def test_an_outbox_that_cannot_be_written_is_said_and_the_agent_answers(side: Side) -> None:
    await side.give_model()
    await side.agent.stop()
    # No user may make a file where a folder is, not even root.
    (side.agent.state_dir / "outbox.sqlite").unlink()
    (side.agent.state_dir / "outbox.sqlite").mkdir()
    await side.agent.start()
    assert await side.agent.answers()
    await until(lambda: side.agent.status().outbox.trouble == "read_only")
    assert "in memory only, the disk is read_only" in await side.agent.shown_status()
    # What is in memory leaves as well.
    async with side.controller(), asyncio.timeout(TIMEOUT_S):
        while "outbox.read_only" not in await side.events():
            await asyncio.sleep(0.05)


async def test_the_file_is_whole_after_the_agent_was_killed(side: Side) -> None:
    await side.give_model()
    await side.agent.kill()
    database = sqlite3.connect(side.agent.state_dir / "outbox.sqlite")
    assert database.execute("PRAGMA quick_check").fetchone() == ("ok",)
    database.close()
    await side.agent.start()
    assert await side.agent.answers()
