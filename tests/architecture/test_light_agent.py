"""The agent stays small: what an install brings, what a start imports, how fast the command answers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.fleet_state import Position, PushResult
from tests.support.agent_environment import agent_environment
from tests.support.catalogue_side import released
from tests.support.delivery_shelf import DeliveryShelf
from tests.support.enrolled import Realm
from tests.support.fake_controller import running_controller
from tests.support.local_agent import AgentProcess
from tests.support.onnx_models import dense_net
from tests.support.variants import made_variant

HEAVY_DISTRIBUTIONS = {"ray", "torch", "sqlalchemy", "fastapi", "starlette", "pandas"}
FORBIDDEN_IMPORTS = {"controller", "ray", "sqlalchemy", "fastapi", "starlette", "uvicorn", "aiohttp", "onnx"}
# What verification takes, in a process of its own: some 12 MB.
CHILDREN_ONLY = {"tuf", "securesystemslib", "cryptography"}
HELP_LIMIT_S = 0.5


@pytest.fixture(scope="module")
def installed() -> Path:
    """The `bin` folder of a fresh environment that holds `nanofleet[agent]` only."""
    return agent_environment()


def fastest_s(*command: str | Path, cwd: Path) -> float:
    """Return the shortest of three runs: what the command costs, without what else the machine does."""
    durations = []
    for _ in range(3):
        started_s = time.perf_counter()
        subprocess.run(command, cwd=cwd, check=True, capture_output=True)
        durations.append(time.perf_counter() - started_s)
    return min(durations)


def imported_by(module: str, *, python: str | Path = sys.executable, cwd: Path) -> set[str]:
    """Return the top-level packages that importing `module` brings in."""
    script = f"import json, sys, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([python, "-c", script], cwd=cwd, check=True, capture_output=True)
    return set(json.loads(done.stdout))


def test_an_agent_install_brings_nothing_of_the_controllers(installed: Path) -> None:
    command = [str(installed / "python"), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    done = subprocess.run(command, check=True, capture_output=True)
    names = {entry["name"].lower() for entry in json.loads(done.stdout)}
    assert "nanofleet" in names
    assert not names & HEAVY_DISTRIBUTIONS


def test_the_installed_agent_can_be_imported(installed: Path, tmp_path: Path) -> None:
    assert "onnxruntime" in imported_by("edge_agent.main", python=installed / "python", cwd=tmp_path)


def test_the_installed_command_answers_help_at_once(installed: Path, tmp_path: Path) -> None:
    assert fastest_s(installed / "nanofleet-agent", "--help", cwd=tmp_path) < HELP_LIMIT_S


def test_importing_the_agent_imports_nothing_of_the_controllers(tmp_path: Path) -> None:
    # In this environment, where all of it is installed and could be imported.
    assert not imported_by("edge_agent.main", cwd=tmp_path) & FORBIDDEN_IMPORTS


def test_the_command_line_imports_no_runtime_before_it_is_needed(tmp_path: Path) -> None:
    assert not imported_by("edge_agent.__main__", cwd=tmp_path) & {"numpy", "grpc", "onnxruntime", "pydantic"}


async def test_an_agent_that_verified_and_activated_a_model_has_no_cryptography_in_its_own_process(
    tmp_path: Path,
) -> None:
    made = released(made_variant({"model.onnx": dense_net().SerializeToString()}), release_counter=1)
    realm = Realm()
    realm.release(made)
    async with running_controller(realm, DeliveryShelf(made)) as controller:
        agent = AgentProcess(tmp_path, realm=realm, controller=controller.address)
        # Its children do not inherit the option.
        await agent.start("-X", "importtime")
        try:
            await controller.fleet.push(made, generation=1)
            await controller.fleet.until(lambda: PushResult(Position(1, 1)) in controller.fleet.results)
        finally:
            await agent.kill()
    lines = [line for line in agent.log.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "onnxruntime" in imported
    assert not imported & CHILDREN_ONLY
