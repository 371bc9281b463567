"""A model's way to a real agent process: pushed, fetched, loaded, reported; and what happens when that goes wrong."""

import asyncio
import random
from pathlib import Path

from core.addresses import Address
from core.digest import Digest, digest_of
from core.fleet_state import NOWHERE, Position, PushResult, SlotPhase
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.fake_controller import FakeController, running_controller
from tests.support.local_agent import running_agent
from tests.support.mosquitto import free_port
from tests.support.onnx_models import dense_net
from tests.support.shelf import Sent, Shelf, Silence
from tests.support.variants import MadeVariant, made_variant

MODEL = dense_net().SerializeToString()
# Not read by the model: it only makes the transfer long enough to be cut.
BALLAST = random.Random(1).randbytes(300_000)
BALLAST_DIGEST = digest_of(BALLAST)
LIGHT = made_variant({"model.onnx": MODEL})
LARGE = made_variant({"model.onnx": MODEL, "ballast.bin": BALLAST}, version=2)


def phases(controller: FakeController) -> list[SlotPhase]:
    """Return the phases that the first slot was reported in, in order."""
    return [report.slots[0].phase for report in controller.fleet.reported if report.slots]


async def applied(controller: FakeController, variant: MadeVariant, *, generation: int) -> None:
    await controller.fleet.push(variant, generation=generation)
    expected = PushResult(Position(1, generation))
    await controller.fleet.until(lambda: expected in controller.fleet.results)


async def test_a_pushed_model_is_fetched_tried_loaded_reported_and_answers(tmp_path: Path) -> None:
    async with (
        running_controller(Shelf(LIGHT)) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await controller.fleet.until(lambda: bool(controller.fleet.hellos))
        assert controller.fleet.hellos[0].applied == NOWHERE
        await applied(controller, LIGHT, generation=1)
        await controller.fleet.until(lambda: phases(controller)[-1:] == [SlotPhase.PROBATION])
        report = controller.fleet.reported[-1]
        assert report.applied == Position(1, 1)
        assert report.slots[0].stored_bytes == len(MODEL)
        assert (await agent.ask()).outputs[0].array.shape == (1, 3)


async def test_an_agent_killed_in_the_middle_of_a_fetch_resumes_where_it_stopped(tmp_path: Path) -> None:
    shelf = Shelf(LARGE, chunk_bytes=100_000)

    def stall_after_two_chunks(chunks: list[pb.Piece]) -> list[Sent]:
        return [*chunks[:2], Silence()]

    shelf.faults.extend([list, list, stall_after_two_chunks])
    partial = tmp_path / "state" / "store" / "partial" / BALLAST_DIGEST.removeprefix("sha256:")
    async with (
        running_controller(shelf) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await controller.fleet.push(LARGE, generation=1)
        await controller.fleet.until(lambda: partial.exists() and partial.stat().st_size == 200_000)
        await agent.kill()
        await agent.start()
        await controller.fleet.until(lambda: PushResult(Position(1, 1)) in controller.fleet.results)
        assert await agent.answers()
    assert shelf.asked_for(BALLAST_DIGEST) == [0, 200_000]


async def test_corrupt_bytes_are_refused_and_fetched_again(tmp_path: Path) -> None:
    shelf = Shelf(LIGHT)

    def corrupt(chunks: list[pb.Piece]) -> list[Sent]:
        chunks[0].data = bytes(len(chunks[0].data))
        return list(chunks)

    shelf.faults.extend([list, corrupt])
    async with (
        running_controller(shelf) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        assert await agent.answers()
    assert shelf.asked_for(Digest(LIGHT.manifest.files[0].digest)) == [0, 0]


async def test_bytes_that_stay_corrupt_end_in_a_rejection_and_the_old_version_answers(tmp_path: Path) -> None:
    shelf = Shelf(LIGHT, LARGE)
    shelf.blobs[BALLAST_DIGEST] = bytes(len(BALLAST))
    async with (
        running_controller(shelf) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        await controller.fleet.push(LARGE, generation=2)
        await controller.fleet.until(lambda: len(controller.fleet.results) == 2)
        problem = controller.fleet.results[1].problem
        assert problem is not None
        assert problem.code == "integrity"
        assert (await agent.ask()).model_version == "1"


async def test_a_file_that_is_no_model_is_rejected_and_the_old_version_answers(tmp_path: Path) -> None:
    broken = made_variant({"model.onnx": b"not an ONNX model"}, version=2)
    async with (
        running_controller(Shelf(LIGHT, broken)) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        await controller.fleet.push(broken, generation=2)
        await controller.fleet.until(lambda: len(controller.fleet.results) == 2)
        assert controller.fleet.results[1].problem is not None
        assert (await agent.ask()).model_version == "1"


async def test_an_agent_restarted_with_the_controller_away_answers(tmp_path: Path) -> None:
    async with (
        running_controller(Shelf(LIGHT)) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
    async with running_agent(tmp_path, controller=controller.address) as agent:
        assert await agent.answers()
        assert not agent.status().controller.is_connected


async def test_an_agent_finds_a_controller_that_comes_back(tmp_path: Path) -> None:
    port = free_port()
    async with (
        running_controller(Shelf(LIGHT), port=port) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        # The controller goes; another one, which holds a newer state, takes its place.
    async with (
        running_agent(tmp_path, controller=controller.address) as agent,
        running_controller(Shelf(LIGHT, LARGE), port=port) as successor,
    ):
        await applied(successor, LARGE, generation=2)
        assert successor.fleet.hellos[-1].applied == Position(1, 1)
        assert (await agent.ask()).model_version == "2"


async def test_an_agent_that_is_told_to_stop_ends_cleanly(tmp_path: Path) -> None:
    async with (
        running_controller(Shelf(LIGHT)) as controller,
        running_agent(tmp_path, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        assert await agent.stop() == 0
        assert not (agent.state_dir / "endpoints.json").exists()
        assert "Traceback" not in agent.log


async def test_an_agent_whose_broker_and_controller_are_away_says_so_and_goes_on_trying(tmp_path: Path) -> None:
    broker_port = free_port()
    async with running_agent(tmp_path, controller=Address("127.0.0.1", free_port()), broker_port=broker_port) as agent:
        async with asyncio.timeout(10):
            while "trying again" not in (text := await agent.shown_status()) or "Connect call failed" not in text:
                await asyncio.sleep(0.2)
        assert f"broker      127.0.0.1:{broker_port} away" in text
        assert "running as process" in text
