"""C07: the controller comes back from yesterday's backup while agents run what was deployed today.

A real controller and real agents, and the commands that an operator types.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from onnx import helper
from rich.console import Console

from controller.demo.operator import Operator
from controller.demo.processes import Part, Parts, kill_group
from controller.demo.stack import START_TIMEOUT_S, Controller, write_toml
from core.errors import NanofleetError
from tests.support.enrolled import Realm
from tests.support.local_agent import AgentProcess
from tests.support.onnx_models import model_of

MODEL, SITE, AGENTS = "meter", "berlin", ("gate-1", "gate-2")
WAIT_S, POLL_S = 60.0, 0.1
# Chosen: a dozen reconnects of an agent, whose pauses are capped at half a second.
WATCHED_S = 6.0


def scaling(factor: float) -> onnx.ModelProto:
    """Return a model that multiplies: what it answers says which version it is."""
    weights = {"f": np.array([factor], np.float32)}
    nodes = [helper.make_node("Mul", ["x", "f"], ["y"])]
    return model_of(nodes, inputs={"x": ["n", 8]}, outputs={"y": ["n", 8]}, weights=weights)


class Drill:
    """A controller without a heavy tier, and what its operator types."""

    def __init__(self, folder: Path, parts: Parts) -> None:
        self.folder = folder
        self._parts = parts
        self.controller = Controller.planned(folder / "controller")
        top = {
            "data_dir": str(self.controller.folder / "data"),
            "grpc_bind": str(self.controller.grpc),
            "enrolment_bind": str(self.controller.enrolment),
            "http_bind": str(self.controller.http),
        }
        # The discard port: nobody listens there.
        write_toml(self.controller.configuration, top, heavy={"mode": "url", "url": "http://127.0.0.1:9"})
        self.operator = Operator(self.controller, Console(stderr=True, quiet=True))
        self.part: Part | None = None

    def run(self, *words: str) -> dict[str, Any]:
        return self.operator.run(*words)

    def here(self, *words: str) -> dict[str, Any]:
        """Run a command that works on data_dir."""
        return self.run("controller", *words, "--config", str(self.controller.configuration))

    def said_by(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command whose words on standard error count."""
        who = ["--credential", str(self.controller.credential)]
        command = [sys.executable, "-m", "controller.cli.app", *who, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)

    def start(self) -> None:
        self.part = self.controller.start(self._parts)

    def kill(self) -> None:
        assert self.part is not None
        kill_group(self.part.process.pid)
        self.part.process.wait(WAIT_S)

    def publish(self, factor: float) -> int:
        path = self.folder / f"times-{factor:g}.onnx"
        path.write_bytes(scaling(factor).SerializeToString())
        version: int = self.run("models", "publish", MODEL, str(path))["version"]
        return version

    def enrol(self, agent_id: str) -> AgentProcess:
        folder = self.folder / agent_id
        folder.mkdir()
        token = self.operator.token(site=SITE, agent=agent_id)
        words = ["enrol", token, "--state-dir", str(folder / "state")]
        self._parts.start_python(f"{agent_id}-enrol", "edge_agent", *words).finish(timeout_s=START_TIMEOUT_S)
        return AgentProcess(folder, realm=Realm(), controller=self.controller.grpc)


@asynccontextmanager
async def drill(folder: Path) -> AsyncIterator[tuple[Drill, list[AgentProcess]]]:
    """Yield a running controller with two running agents that run nothing yet."""
    async with AsyncExitStack() as stack:
        parts = stack.enter_context(Parts(folder / "logs"))
        made = await asyncio.to_thread(Drill, folder, parts)
        await asyncio.to_thread(made.here, "init", "--url", made.controller.url)
        await asyncio.to_thread(made.start)
        agents = []
        for agent_id in AGENTS:
            agent = await asyncio.to_thread(made.enrol, agent_id)
            await agent.start()
            stack.push_async_callback(agent.kill)
            agents.append(agent)
        yield made, agents


async def factor_of(agent: AgentProcess) -> float:
    """Return by how much the version multiplies that answers here now."""
    response = await agent.ask(MODEL)
    return float(response.outputs[0].array[0, 0])


async def wait_for_factor(agent: AgentProcess, factor: float) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while time.monotonic() < give_up_s:
        try:
            if await factor_of(agent) == factor:
                return
        except NanofleetError:
            pass  # Not there yet.
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"no answer of the version that multiplies by {factor}:\n{agent.log[-3000:]}")


async def ahead(made: Drill, count: int) -> dict[str, Any]:
    """Wait until so many agents are ahead; return the drift."""
    give_up_s = time.monotonic() + WAIT_S
    while True:
        drift = await asyncio.to_thread(made.run, "controller", "drift")
        if drift["ahead_count"] == count and drift["unheard_count"] == 0:
            return drift
        assert time.monotonic() < give_up_s, drift
        await asyncio.sleep(POLL_S)


class Answers:
    """Everything that an agent answered while somebody else was busy."""

    def __init__(self, agents: list[AgentProcess]) -> None:
        self._agents = agents
        self.factors: set[float] = set()
        self.count = 0

    async def collect(self) -> None:
        while True:
            for agent in self._agents:
                self.factors.add(await factor_of(agent))
                self.count += 1
            await asyncio.sleep(POLL_S)


async def test_C07_a_controller_restored_to_yesterday_rolls_nothing_back_and_tells_the_operator(tmp_path: Path) -> None:
    async with drill(tmp_path) as (made, agents):
        first = await asyncio.to_thread(made.publish, 1)
        await asyncio.to_thread(made.run, "deploy", f"{MODEL}:{first}", "--variant", "original", "--fleet")
        backup = tmp_path / "yesterday"
        await asyncio.to_thread(made.here, "backup", str(backup))
        second = await asyncio.to_thread(made.publish, 2)
        await asyncio.to_thread(made.run, "deploy", f"{MODEL}:{second}", "--variant", "original", "--fleet")
        for agent in agents:
            await wait_for_factor(agent, 2)

        answers = Answers(agents)
        async with asyncio.TaskGroup() as tasks:
            collecting = tasks.create_task(answers.collect(), name="answers")
            await asyncio.to_thread(made.kill)
            await asyncio.to_thread(made.here, "restore", str(backup), "--replace")
            await asyncio.to_thread(made.start)
            await _see_what_the_operator_is_told(made)
            await asyncio.sleep(WATCHED_S)
            confirmed = await asyncio.to_thread(made.run, "controller", "confirm-restore")
            assert confirmed["epoch"] == 2
            assert "new online keys" in confirmed["catalogue"]
            assert (await ahead(made, 2))["is_watching"] is False
            await asyncio.sleep(WATCHED_S)
            collecting.cancel()
        assert answers.factors == {2.0}
        assert answers.count > 50

        await _adopt_either(made, agents)
        entries = (await asyncio.to_thread(made.run, "audit", "list", "--action", "restore."))["entries"]
        assert [entry["action"] for entry in entries] == ["restore.confirm", "restore.watch"]
        assert (await asyncio.to_thread(made.run, "audit", "verify"))["problem"] is None


async def _see_what_the_operator_is_told(made: Drill) -> None:
    drift = await ahead(made, 2)
    assert drift["is_watching"] is True
    assert drift["catalogue_is_behind"] is True
    assert [[slot["version"] for slot in agent["runs"]] for agent in drift["ahead"]] == [[2], [2]]
    assert [[slot["version"] for slot in agent["wants"]] for agent in drift["ahead"]] == [[1], [1]]
    listed = await asyncio.to_thread(made.said_by, "devices", "list")
    assert listed.returncode == 0
    assert "restored from a backup" in listed.stderr
    refused = await asyncio.to_thread(made.said_by, "deploy", f"{MODEL}:1", "--variant", "original", "--fleet")
    assert refused.returncode == 1
    assert "confirm-restore" in refused.stderr
    assert httpx.get(f"{made.controller.url}/api/health").json()["is_restored_unconfirmed"] is True
    assert made.part is not None
    assert "this state came from a backup" in made.part.log.read_text()


async def _adopt_either(made: Drill, agents: list[AgentProcess]) -> None:
    """Take what the backup says on one agent, and what is published anew on the other."""
    one, other = agents
    await asyncio.to_thread(made.run, "deploy", f"{MODEL}:1", "--variant", "original", "--agent", AGENTS[1])
    await wait_for_factor(other, 1)
    assert await factor_of(one) == 2
    again = await asyncio.to_thread(made.publish, 3)
    await asyncio.to_thread(made.run, "deploy", f"{MODEL}:{again}", "--variant", "original", "--agent", AGENTS[0])
    await wait_for_factor(one, 3)
    assert await factor_of(other) == 1
    assert (await ahead(made, 0))["is_watching"] is False
