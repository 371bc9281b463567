"""A model's way to a real agent process: pushed, fetched, loaded, reported; and what happens when that goes wrong."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from controller.demo.ports import free_port
from core.addresses import Address
from core.digest import digest_of
from core.fleet_state import NOWHERE, Position, PushResult, SlotPhase
from protos.artifacts.v1 import artifacts_pb2 as pb
from tests.support.catalogue_side import DirectorKey, released
from tests.support.delivery_shelf import DeliveryShelf, Sent, Silence
from tests.support.enrolled import Realm
from tests.support.fake_controller import FakeController, running_controller
from tests.support.local_agent import running_agent
from tests.support.onnx_models import dense_net
from tests.support.variants import MadeVariant, made_variant

MODEL = dense_net().SerializeToString()
# Not read by the model: it only makes the transfer long enough to be cut.
BALLAST = random.Random(1).randbytes(600_000)
LIGHT = released(made_variant({"model.onnx": MODEL}), release_counter=1)
LARGE = released(
    made_variant({"model.onnx": MODEL, "ballast.bin": BALLAST}, version=2, chunk_bytes=100_000), release_counter=2
)
BROKEN = released(made_variant({"model.onnx": b"not an ONNX model"}, version=2), release_counter=2)


@pytest.fixture
def realm() -> Realm:
    realm = Realm()
    realm.release(LIGHT, LARGE)
    return realm


def phases(controller: FakeController) -> list[SlotPhase]:
    """Return the phases that the first slot was reported in, in order."""
    return [report.slots[0].phase for report in controller.fleet.reported if report.slots]


def stored_bytes(controller: FakeController) -> int:
    """Return how many bytes of the first slot are said to be on the agent."""
    reported = controller.fleet.reported[-1:]
    return reported[0].slots[0].stored_bytes if reported and reported[0].slots else 0


async def applied(controller: FakeController, variant: MadeVariant, *, generation: int) -> None:
    await controller.fleet.push(variant, generation=generation)
    expected = PushResult(Position(1, generation))
    await controller.fleet.until(lambda: expected in controller.fleet.results)


async def refused(controller: FakeController, *, generation: int) -> str:
    """Wait for the answer to the push of `generation`; return the code of its problem."""

    def answers() -> list[PushResult]:
        return [result for result in controller.fleet.results if result.position == Position(1, generation)]

    await controller.fleet.until(lambda: bool(answers()))
    problem = answers()[0].problem
    assert problem is not None
    return problem.code


async def test_a_pushed_model_is_verified_fetched_tried_loaded_reported_and_answers(
    realm: Realm, tmp_path: Path
) -> None:
    async with (
        running_controller(realm, DeliveryShelf(LIGHT)) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await controller.fleet.until(lambda: bool(controller.fleet.hellos))
        assert controller.fleet.hellos[0].applied == NOWHERE
        await applied(controller, LIGHT, generation=1)
        await controller.fleet.until(lambda: phases(controller)[-1:] == [SlotPhase.PROBATION])
        report = controller.fleet.reported[-1]
        assert report.applied == Position(1, 1)
        assert report.slots[0].stored_bytes == len(MODEL)
        assert (await agent.ask()).outputs[0].array.shape == (1, 3)


async def test_an_assignment_by_a_director_that_nobody_listed_brings_nothing(realm: Realm, tmp_path: Path) -> None:
    shelf = DeliveryShelf(LIGHT)
    async with (
        running_controller(realm, shelf) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await controller.fleet.push(LIGHT, generation=1, by=DirectorKey())
        assert await refused(controller, generation=1) == "forbidden"
        assert not await agent.answers()
    assert shelf.asked_manifests == []


async def test_a_variant_that_is_not_in_the_catalogue_is_refused_before_it_is_fetched(
    realm: Realm, tmp_path: Path
) -> None:
    shelf = DeliveryShelf(LIGHT, BROKEN)
    async with (
        running_controller(realm, shelf) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        await controller.fleet.push(BROKEN, generation=2)
        assert await refused(controller, generation=2) == "forbidden"
        assert (await agent.ask()).model_version == "1"
    assert shelf.asked_manifests == [LIGHT.digest]


async def test_an_agent_killed_in_the_middle_of_a_fetch_resumes_where_it_stopped(realm: Realm, tmp_path: Path) -> None:
    shelf = DeliveryShelf(LARGE)

    def stall_before_the_last_chunk(replies: list[pb.FetchChunksReply]) -> Sequence[Sent]:
        return [*replies[:-1], Silence()]

    shelf.faults.append(stall_before_the_last_chunk)
    async with (
        running_controller(realm, shelf) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await controller.fleet.push(LARGE, generation=1)
        await controller.fleet.until(lambda: stored_bytes(controller) == len(MODEL) + 500_000)
        await agent.kill()
        await agent.start()
        await controller.fleet.until(lambda: PushResult(Position(1, 1)) in controller.fleet.results)
        assert await agent.answers()
    assert shelf.asked_chunks == [[0, 1, 2, 3, 4, 5, 6], [6]]


async def test_corrupt_bytes_are_refused_and_fetched_again(realm: Realm, tmp_path: Path) -> None:
    shelf = DeliveryShelf(LIGHT)

    def corrupt(replies: list[pb.FetchChunksReply]) -> Sequence[Sent]:
        replies[1].chunk.data = bytes(len(replies[1].chunk.data))
        return replies

    shelf.faults.append(corrupt)
    async with (
        running_controller(realm, shelf) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        assert await agent.answers()
    assert shelf.asked_chunks == [[0], [0]]


async def test_bytes_that_stay_corrupt_end_in_a_rejection_and_the_old_version_answers(
    realm: Realm, tmp_path: Path
) -> None:
    swapped = {**LARGE.blobs, digest_of(BALLAST): bytes(len(BALLAST))}
    shelf = DeliveryShelf(LIGHT, replace(LARGE, blobs=swapped))
    async with (
        running_controller(realm, shelf) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        await controller.fleet.push(LARGE, generation=2)
        assert await refused(controller, generation=2) == "integrity"
        assert (await agent.ask()).model_version == "1"


async def test_a_file_that_is_no_model_is_rejected_and_the_old_version_answers(realm: Realm, tmp_path: Path) -> None:
    realm.release(BROKEN)
    async with (
        running_controller(realm, DeliveryShelf(LIGHT, BROKEN)) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        await controller.fleet.push(BROKEN, generation=2)
        assert await refused(controller, generation=2) == "forbidden"
        assert (await agent.ask()).model_version == "1"


async def test_an_agent_restarted_with_the_controller_away_answers(realm: Realm, tmp_path: Path) -> None:
    async with (
        running_controller(realm, DeliveryShelf(LIGHT)) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
    async with running_agent(tmp_path, realm=realm, controller=controller.address) as agent:
        assert await agent.answers()
        assert not agent.status().controller.is_connected


async def test_an_agent_finds_a_controller_that_comes_back(realm: Realm, tmp_path: Path) -> None:
    port = free_port()
    async with (
        running_controller(realm, DeliveryShelf(LIGHT), port=port) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        # The controller goes; another one, which holds a newer state, takes its place.
    async with (
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
        running_controller(realm, DeliveryShelf(LIGHT, LARGE), port=port) as successor,
    ):
        await applied(successor, LARGE, generation=2)
        assert successor.fleet.hellos[-1].applied == Position(1, 1)
        assert (await agent.ask()).model_version == "2"


async def test_a_controller_of_another_fleet_gets_nothing_and_its_status_says_why(realm: Realm, tmp_path: Path) -> None:
    async with (
        running_controller(Realm(), DeliveryShelf(LIGHT)) as stranger,
        running_agent(tmp_path, realm=realm, controller=stranger.address) as agent,
    ):
        async with asyncio.timeout(10):
            while "its certificate does not hold here" not in await agent.shown_status():
                await asyncio.sleep(0.2)
        assert stranger.fleet.hellos == []


async def test_an_agent_that_is_told_to_stop_ends_cleanly(realm: Realm, tmp_path: Path) -> None:
    async with (
        running_controller(realm, DeliveryShelf(LIGHT)) as controller,
        running_agent(tmp_path, realm=realm, controller=controller.address) as agent,
    ):
        await applied(controller, LIGHT, generation=1)
        assert await agent.stop() == 0
        assert not (agent.state_dir / "endpoints.json").exists()
        assert "Traceback" not in agent.log


async def test_an_agent_whose_broker_and_controller_are_away_says_so_and_goes_on_trying(
    realm: Realm, tmp_path: Path
) -> None:
    broker_port, controller = free_port(), Address("127.0.0.1", free_port())
    async with running_agent(tmp_path, realm=realm, controller=controller, broker_port=broker_port) as agent:
        async with asyncio.timeout(10):
            while "trying again" not in (text := await agent.shown_status()) or "Connect call failed" not in text:
                await asyncio.sleep(0.2)
        assert f"broker      127.0.0.1:{broker_port} away" in text
        assert "running as process" in text
        assert "certificate good for 6 d 23 h" in text
