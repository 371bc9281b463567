"""Hard examples from a real agent's disk through a real controller into an operator's folder."""

import asyncio
import json
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.health.status_file import read_status
from edge_agent.samples.store import KeptSample, SampleStore, StoreBounds
from tests.support.controller_process import ControllerProcess
from tests.support.hard_examples import made_file

AGENT, SITE = "gate-1", "berlin"
TIMEOUT_S = 60.0
CONFIG = """\
state_dir = "{folder}/state"
grpc_bind = ""
metered = {metered}
[mqtt]
enabled = false
[link]
first_delay_s = 0.0
reconnect_base_s = 0.05
reconnect_cap_s = 0.5
[samples]
enabled = true
keep_site = true
reserve_bytes = 0
"""


async def output_of(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


@dataclass(frozen=True, slots=True)
class Site:
    """A controller that runs, and the folder of an agent that is enrolled there and keeps three samples."""

    controller: ControllerProcess
    folder: Path
    kept: tuple[KeptSample, ...]
    secret: KeptSample

    async def nanofleet(self, *words: str) -> Any:
        credential = await asyncio.to_thread(self.controller.credential)
        return json.loads(await output_of("controller.cli.app", "--credential", str(credential), *words, "-o", "json"))

    async def agent_command(self, *words: str) -> str:
        return await output_of("edge_agent", "samples", *words, "--state-dir", f"{self.folder}/state")

    @asynccontextmanager
    async def agent(self) -> AsyncIterator[Process]:
        """Run the agent, and wait until the controller sees it."""
        with (self.folder / "agent.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "edge_agent", "run", "--config", f"{self.folder}/agent.toml"),
                stdout=log,
                stderr=log,
            )
        try:
            async with asyncio.timeout(TIMEOUT_S), self.controller.http() as http:
                while not (await http.get(f"/api/agents/{AGENT}")).json().get("is_online"):
                    assert process.returncode is None, (self.folder / "agent.log").read_text()
                    await asyncio.sleep(0.05)
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


def put(store: SampleStore, number: int, *, privacy: str = "any") -> KeptSample:
    at = datetime.now(UTC) - timedelta(minutes=10 - number)
    # Some of several chunks.
    return store.put(*made_file(mark=number / 10, taken_at=at, privacy=privacy, size=300_000 if number else 3), now=at)


@asynccontextmanager
async def site(folder: Path, *, is_metered: bool = False) -> AsyncIterator[Site]:
    with ControllerProcess(folder / "controller") as controller:
        store = SampleStore(folder / "state" / "samples", StoreBounds(reserve_bytes=0))
        kept = tuple(put(store, number) for number in range(3))
        made = Site(controller, folder, kept, put(store, 7, privacy="site"))
        (folder / "agent.toml").write_text(CONFIG.format(folder=folder, metered=str(is_metered).lower()))
        await asyncio.to_thread(controller.endpoints)
        async with controller.http() as http:
            answer = await http.post("/api/enrolment-tokens", json={"site": SITE, "agent": AGENT})
        await output_of("edge_agent", "enrol", answer.json()["text"], "--state-dir", f"{folder}/state")
        yield made


def arrays_in(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for line in (folder / "index.jsonl").read_text().splitlines():
        entry = json.loads(line)
        with np.load(folder / entry["file"], allow_pickle=False) as arrays:
            found[entry["digest"]] = arrays["input/x"]
    return found


async def test_an_operator_pulls_what_an_agent_keeps_and_nothing_that_may_not_leave_the_site(tmp_path: Path) -> None:
    async with site(tmp_path) as made:
        async with made.agent():
            pulled = await made.nanofleet("samples", "pull", "digits", "--agent", AGENT, "--out", f"{tmp_path}/hard")
            assert (pulled["fetched"], pulled["missing"]) == (3, [])
            status = read_status(tmp_path / "state" / "status.json")
            assert "samples_stored" in status.counters
        assert set(arrays_in(tmp_path / "hard")) == {kept.digest for kept in made.kept}
        # Neither on the controller's disk nor in the folder.
        secret = (tmp_path / "state" / "samples" / made.secret.file_name).read_bytes()
        others = [path for name in ("controller", "hard") for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert not [path for path in others if secret[200:300] in path.read_bytes()]
        # They stay on the agent for whoever pulls next.
        assert "4 samples" in await made.agent_command("list")


async def test_an_agent_that_was_offline_delivers_when_it_returns(tmp_path: Path) -> None:
    async with site(tmp_path) as made:
        async with made.agent():
            pass
        pulled = await made.nanofleet("samples", "pull", "digits", "--agent", AGENT, "--out", f"{tmp_path}/hard")
        assert (pulled["fetched"], pulled["missing"][0]["state"]) == (0, "waiting")
        async with made.agent():
            words = ("samples", "fetch", pulled["pull"], "--out", f"{tmp_path}/hard", "--wait", "30")
            assert (await made.nanofleet(*words))["fetched"] == 3


async def test_a_metered_agent_delivers_only_with_a_persons_word(tmp_path: Path) -> None:
    async with site(tmp_path, is_metered=True) as made, made.agent():
        words = ("samples", "pull", "digits", "--agent", AGENT, "--out", f"{tmp_path}/hard")
        refused = await made.nanofleet(*words)
        assert [each["reason"] for each in refused["missing"]] == ["metered"]
        assert (await made.nanofleet(*words, "--allow-metered"))["fetched"] == 3


async def test_an_operator_sees_how_many_an_agent_keeps(tmp_path: Path) -> None:
    async with site(tmp_path) as made, made.agent():
        async with asyncio.timeout(TIMEOUT_S):
            while not (found := await made.nanofleet("samples", "list"))["counts"]:
                await asyncio.sleep(0.5)
        assert [(row["model"], row["label"], row["samples"]) for row in found["counts"]] == [("digits", 1, 4)]


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_person_at_the_machine_exports_and_purges_whether_the_agent_runs_or_not(
    tmp_path: Path, is_running: bool
) -> None:
    async with site(tmp_path) as made:
        if is_running:
            async with made.agent():
                exported = await made.agent_command("export", "--out", f"{tmp_path}/out")
                assert "4 samples removed" in await made.agent_command("purge")
        else:
            exported = await made.agent_command("export", "--out", f"{tmp_path}/out", "--model", "digits")
            assert "0 samples removed" in await made.agent_command("purge", "--model", "faces")
            assert "4 samples removed" in await made.agent_command("purge", "--model", "digits")
        assert "4 samples exported" in exported
        assert set(arrays_in(tmp_path / "out")) == {kept.digest for kept in (*made.kept, made.secret)}
        assert json.loads(await made.agent_command("list", "-o", "json")) == {"samples": [], "size_bytes": 0}
