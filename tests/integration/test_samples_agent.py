"""Hard examples in a real agent: from a request over its own face to a file that numpy reads."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from core.fleet_state import Position, PushResult
from core.manifest import Cascade, ScoreKind
from tests.support.catalogue_side import released
from tests.support.delivery_shelf import DeliveryShelf
from tests.support.enrolled import Realm
from tests.support.fake_controller import FakeController, running_controller
from tests.support.local_agent import AgentProcess
from tests.support.onnx_models import dense_net
from tests.support.variants import made_variant

# No answer is ever sure enough for it.
NEVER_SURE = Cascade(escalate_to="large", score_output="y", score_kind=ScoreKind.LOGITS, temperature=1.0, threshold=1.0)
VARIANT = released(made_variant({"model.onnx": dense_net().SerializeToString()}), release_counter=1, cascade=NEVER_SURE)
ON = {"NANOFLEET_AGENT_SAMPLES__ENABLED": "true", "NANOFLEET_AGENT_SAMPLES__RESERVE_BYTES": "0"}
TIMEOUT_S = 20.0


async def serving(controller: FakeController, agent: AgentProcess) -> None:
    await agent.start()
    await controller.fleet.push(VARIANT, generation=1)
    await controller.fleet.until(lambda: PushResult(Position(1, 1)) in controller.fleet.results)


@pytest.mark.parametrize("environment", [ON, {}])
async def test_an_unsure_answer_is_kept_only_where_that_was_chosen_and_device_data_nowhere(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    realm = Realm()
    realm.release(VARIANT)
    folder = tmp_path / "state" / "samples"
    async with running_controller(realm, DeliveryShelf(VARIANT)) as controller:
        agent = AgentProcess(tmp_path, realm=realm, controller=controller.address, environment=environment)
        try:
            await serving(controller, agent)
            for privacy, value in (("device", 0.25), ("site", 0.5), ("any", 0.75)):
                assert (await agent.ask(value=value, privacy=privacy)).parameters["tier"] == "edge"
            if environment:
                async with asyncio.timeout(TIMEOUT_S):
                    while not list(folder.glob("*.npz")):
                        await asyncio.sleep(0.02)
        finally:
            assert await agent.stop() == 0, agent.log
    kept = list(folder.glob("*")) if folder.exists() else []
    assert len(kept) == len(environment) / 2
    for path in kept:
        with np.load(path, allow_pickle=False) as arrays:
            assert np.array_equal(arrays["input/x"], np.full((1, 8), 0.75, np.float32))
            assert arrays["edge/y"].shape == (1, 3)


async def test_requests_are_answered_where_samples_cannot_be_written_and_the_status_says_so(tmp_path: Path) -> None:
    realm = Realm()
    realm.release(VARIANT)
    (tmp_path / "state").mkdir()
    async with running_controller(realm, DeliveryShelf(VARIANT)) as controller:
        agent = AgentProcess(tmp_path, realm=realm, controller=controller.address, environment=ON)
        # In the way of the folder.
        (tmp_path / "state" / "samples").write_text("")
        try:
            await serving(controller, agent)
            for _ in range(3):
                assert (await agent.ask()).outputs[0].array.shape == (1, 3)
        finally:
            # Its last status is written when it stops.
            assert await agent.stop() == 0, agent.log
    assert 1 <= agent.status().counters["samples_dropped_disk"] <= 3
    assert agent.log.count("hard examples cannot be kept") == 1
