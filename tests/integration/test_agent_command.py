"""`nanofleet-agent` on its command line, as a process: enrol, retry, tuf-client."""

import asyncio
import hashlib
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from core.clock import SystemClock
from core.enrolment_token import EnrolmentToken
from core.fleet_state import Problem
from core.ids import AgentId
from edge_agent.activation.journal import Journal
from edge_agent.activation.record import Quarantine, Record
from edge_agent.health.state_folder import StateFolder
from edge_agent.identity.folder import IdentityFolder
from tests.support.catalogue_side import CatalogueSide
from tests.support.trusted_controller import DOMAIN, ROOT, TrustedController, trusted_controller
from tests.support.variants import made_variant

TIMEOUT_S = 30.0


class Said(NamedTuple):
    code: int
    output: str
    errors: str


async def command(*words: str | Path, typed: str = "") -> Said:
    """Run `nanofleet-agent` with `words`; `typed` is its standard input."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge_agent", *words), stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, errors = await process.communicate(typed.encode())
    assert process.returncode is not None
    return Said(process.returncode, output.decode(), errors.decode())


# ---- enrol ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def controller(tmp_path: Path) -> AsyncIterator[TrustedController]:
    async with trusted_controller(tmp_path / "controller") as made:
        yield made


async def token_of(controller: TrustedController, *, agent: str | None = None) -> str:
    return str(
        EnrolmentToken(
            await controller.token(None if agent is None else AgentId(agent)),
            controller.identity.authority_sha256(),
            hashlib.sha256(ROOT).digest(),
            DOMAIN,
            controller.main_address,
            controller.enrolment.address,
        )
    )


async def test_a_token_makes_a_machine_an_agent(controller: TrustedController, tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    token = await token_of(controller, agent="cam-1")
    said = await command("enrol", token, "--state-dir", tmp_path / "state")
    assert said == (0, "this machine is agent cam-1 of site north; `nanofleet-agent run` runs it\n", "")
    identity = IdentityFolder(folder.identity).load()
    assert identity.agent_id == "cam-1"
    assert identity.controller == controller.main_address
    assert (folder.trust / "root.json").read_bytes() == ROOT


async def test_a_token_may_come_over_standard_input_and_a_name_may_be_wished(
    controller: TrustedController, tmp_path: Path
) -> None:
    token = await token_of(controller)
    said = await command("enrol", "-", "--name", "gate-7", "--state-dir", tmp_path / "state", typed=f"{token}\n")
    assert "this machine is agent gate-7" in said.output


async def test_a_machine_that_is_an_agent_already_stays_it_unless_it_is_forced(
    controller: TrustedController, tmp_path: Path
) -> None:
    place = ("--state-dir", tmp_path / "state")
    await command("enrol", await token_of(controller, agent="cam-1"), *place)
    refused = await command("enrol", await token_of(controller, agent="cam-2"), *place)
    assert refused.code == 1
    assert "this machine is agent cam-1 of site north already; --force gives that up" in refused.errors
    forced = await command("enrol", await token_of(controller, agent="cam-3"), "--force", *place)
    assert "this machine is agent cam-3" in forced.output


async def test_a_token_is_good_for_one_machine(controller: TrustedController, tmp_path: Path) -> None:
    token = await token_of(controller)
    assert (await command("enrol", token, "--state-dir", tmp_path / "first")).code == 0
    second = await command("enrol", token, "--state-dir", tmp_path / "second")
    assert second.code == 1
    assert "Traceback" not in second.errors


async def test_what_is_no_token_is_refused_with_a_sentence(tmp_path: Path) -> None:
    said = await command("enrol", "letmein", "--state-dir", tmp_path)
    assert said.code == 1
    assert said.errors.startswith("nanofleet-agent: token: expected one that starts with nft1.")


async def test_an_agent_that_nobody_enrolled_does_not_run_and_says_what_to_do(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\n')
    said = await command("run", "--config", config)
    assert said.code == 1
    assert said.errors == "nanofleet-agent: not enrolled: run `nanofleet-agent enrol TOKEN`\n"


# ---- retry ----------------------------------------------------------------------------------------------------------


def quarantined(state_dir: Path) -> Journal:
    """Return the journal of an agent on which a variant of `digits` failed."""
    entry = Quarantine(made_variant().slot, Problem("forbidden", "failed"), datetime(2026, 1, 2, tzinfo=UTC), "1.0")
    journal = Journal(StateFolder(state_dir).journal, clock=SystemClock())
    journal.update(lambda _: Record(quarantine=(entry,)))
    return journal


async def test_a_model_that_failed_may_be_tried_again_on_a_persons_word(tmp_path: Path) -> None:
    quarantined(tmp_path)
    said = await command("retry", "digits", "--state-dir", tmp_path)
    assert said == (0, "may be tried again: digits:1 int8\n", "")
    assert Journal(StateFolder(tmp_path).journal, clock=SystemClock()).record.quarantine == ()


async def test_another_model_stays_in_quarantine(tmp_path: Path) -> None:
    journal = quarantined(tmp_path)
    said = await command("retry", "faces", "--state-dir", tmp_path)
    assert said == (0, "faces: nothing was in quarantine\n", "")
    assert Journal(StateFolder(tmp_path).journal, clock=SystemClock()).record == journal.record


async def test_nothing_is_released_under_an_agent_that_runs(tmp_path: Path) -> None:
    quarantined(tmp_path)
    with StateFolder(tmp_path).locked():
        said = await command("retry", "digits", "--state-dir", tmp_path)
    assert said.code == 1
    assert "expected to be the only agent here" in said.errors


# ---- tuf-client -----------------------------------------------------------------------------------------------------


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (named by the library)
        return


@contextmanager
def repository(side: CatalogueSide, folder: Path) -> Iterator[str]:
    """Yield the address at which what `side` has published is served."""
    folder.mkdir()
    for name, content in side.files.items():
        (folder / name).write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietFiles, directory=str(folder)))
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        serving.join()
        server.server_close()


async def test_a_catalogue_is_brought_up_to_date_from_a_root_that_is_trusted(tmp_path: Path) -> None:
    side, metadata, root = CatalogueSide(), tmp_path / "metadata", tmp_path / "root.json"
    side.publish()
    root.write_bytes(side.anchor)
    with repository(side, tmp_path / "served") as url:
        assert (await command("tuf-client", "--metadata-dir", metadata, "init", root)).code == 0
        said = await command("tuf-client", "--metadata-dir", metadata, "--metadata-url", url, "refresh")
    assert said == (0, "", "")
    assert (metadata / "timestamp.json").read_bytes() == side.files["timestamp.json"]


async def test_a_catalogue_of_somebody_else_is_refused(tmp_path: Path) -> None:
    metadata, root = tmp_path / "metadata", tmp_path / "root.json"
    root.write_bytes(CatalogueSide().anchor)
    await command("tuf-client", "--metadata-dir", metadata, "init", root)
    with repository(CatalogueSide(), tmp_path / "served") as url:
        said = await command("tuf-client", "--metadata-dir", metadata, "--metadata-url", url, "refresh")
    assert said.code == 1
    assert said.errors.startswith("nanofleet-agent: ")
