"""`nanofleet samples`: what a person sees of pulls, and what lies in the folder afterwards."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from controller.api.sample_views import MAX_PAGE
from controller.cli.app import app
from core.digest import digest_of
from core.ids import AgentId
from core.samples import SampleCount, SampleCounts, SampleName, SampleOffer
from tests.support.fleet_values import made_hello
from tests.support.hard_examples import made_file
from tests.support.operator_side import OperatorSide, RunningController, running_controller

CAM = AgentId("cam-1")
CONTENTS = [made_file(mark=number / 10, label=number)[1] for number in range(3)]
COUNTS = SampleCounts((SampleCount("digits", 7, "low_confidence", 3), SampleCount("faces", None, "tied", 1)), 0, 2000)


class Desk:
    def __init__(self, controller: RunningController, out: Path) -> None:
        self.controller = controller
        self.out = out

    def run(self, *words: str) -> Result:
        environment = {
            "COLUMNS": "200",
            "TERM": "dumb",
            "NANOFLEET_CONTROLLER": self.controller.url,
            "NANOFLEET_CREDENTIAL": str(self.controller.credential_path),
        }
        return CliRunner().invoke(app, ["samples", *words], env=environment, prog_name="nanofleet")

    def json(self, *words: str) -> Any:
        result = self.run(*words, "-o", "json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def pull(self) -> str:
        """Pull from the offline agent; return the pull's id."""
        return str(self.json("pull", "digits", "--agent", CAM, "--out", str(self.out))["pull"])

    def deliver(self, pull_id: str, *contents: bytes, declined: str = "") -> None:
        """Play the agent."""

        async def deliver(side: OperatorSide) -> None:
            names = tuple(SampleName(digest_of(each), len(each)) for each in contents)
            offer = SampleOffer(pull_id, names, declined)
            await side.pulls.offer(CAM, offer)
            for name, content in zip(names, contents, strict=True):
                await side.pulls.receive(CAM, pull_id, name, _whole(content))
            await side.pulls.offer(CAM, offer)

        self.controller.call(deliver)


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _visit(side: OperatorSide) -> None:
    async with side.fleet.session(made_hello()) as (session, _):
        side.fleet.samples.heard(session, COUNTS)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with running_controller(tmp_path) as controller:
        controller.call(_visit)
        yield Desk(controller, tmp_path / "hard")


def test_the_list_says_how_many_by_model_class_and_reason(desk: Desk) -> None:
    shown = desk.run("list").stdout
    assert "4 samples, 2.0 kB" in shown
    assert "low_confidence" in shown
    assert [row["label"] for row in desk.json("list")["counts"]] == [7, None]
    assert "tied" not in desk.run("list", "--model", "digits").stdout


def test_a_pull_does_not_wait_for_an_agent_that_is_offline_and_says_so(desk: Desk) -> None:
    result = desk.run("pull", "digits", "--out", str(desk.out))
    assert result.exit_code == 0, result.output
    assert "0 samples fetched" in result.stdout
    assert "offline" in result.stdout
    assert "agents may deliver until" in result.stdout
    assert "nanofleet samples fetch" in result.stdout


def test_what_an_agent_delivered_later_is_fetched_with_an_index_that_numpy_and_json_alone_read(desk: Desk) -> None:
    pull_id = desk.pull()
    desk.deliver(pull_id, *CONTENTS)
    fetched = desk.json("fetch", pull_id, "--out", str(desk.out))
    assert (fetched["fetched"], fetched["in_folder"], fetched["missing"]) == (3, 3, [])
    lines = [json.loads(line) for line in (desk.out / "index.jsonl").read_text().splitlines()]
    assert sorted(line["label"] for line in lines) == [0, 1, 2]
    for line in lines:
        with np.load(desk.out / line["file"], allow_pickle=False) as arrays:
            assert arrays["input/x"].shape == (1, 3)


def test_more_than_a_page_is_fetched_to_the_end(desk: Desk) -> None:
    pull_id = str(desk.json("pull", "digits", "--agent", CAM, "--limit", "600", "--out", str(desk.out))["pull"])
    many = [made_file(mark=number / 1000)[1] for number in range(MAX_PAGE + 7)]
    desk.deliver(pull_id, *many)
    assert desk.json("fetch", pull_id, "--out", str(desk.out))["fetched"] == len(many)


def test_a_second_fetch_brings_only_what_is_missing(desk: Desk) -> None:
    pull_id = desk.pull()
    desk.deliver(pull_id, *CONTENTS)
    desk.run("fetch", pull_id, "--out", str(desk.out))
    lost, damaged, _ = sorted(desk.out.glob("*.npz"))
    lost.unlink()
    damaged.write_bytes(b"half")
    assert desk.json("fetch", pull_id, "--out", str(desk.out))["fetched"] == 2
    assert sorted(digest_of(path.read_bytes()) for path in desk.out.glob("*.npz")) == sorted(map(digest_of, CONTENTS))


def test_bytes_that_are_no_sample_are_left_out_and_said(desk: Desk) -> None:
    pull_id = desk.pull()
    desk.deliver(pull_id, CONTENTS[0], b"not a sample")
    result = desk.run("fetch", pull_id, "--out", str(desk.out))
    assert result.exit_code == 0, result.output
    assert "1 were damaged and left out" in result.stdout
    assert len(list(desk.out.glob("*.npz"))) == 1


def test_an_agent_that_declined_is_named_with_the_remedy(desk: Desk) -> None:
    pull_id = desk.pull()
    desk.deliver(pull_id, declined="metered")
    assert "--allow-metered" in desk.run("fetch", pull_id, "--out", str(desk.out)).stdout


def test_pulls_are_listed_until_they_are_dropped(desk: Desk) -> None:
    pull_id = desk.pull()
    desk.deliver(pull_id, *CONTENTS)
    assert "1 of 1" in desk.run("pulls").stdout
    assert desk.json("drop", pull_id) == {"removed": pull_id}
    assert desk.json("pulls") == {"pulls": []}
    refused = desk.run("fetch", pull_id, "--out", str(desk.out))
    assert refused.exit_code == 1
    assert "pull again" in refused.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("pull", "digits", "--agent", "cam-1", "--site", "north", "--out", "x"),
        ("pull", "digits", "--agent", "../x", "--out", "x"),
        ("fetch", "../x", "--out", "x"),
        ("drop", "x"),
    ],
)
def test_words_that_say_nothing_clear_are_wrong_usage(desk: Desk, words: tuple[str, ...]) -> None:
    assert desk.run(*words).exit_code == 2


def test_a_model_of_which_nobody_has_samples_is_refused_with_the_reason(desk: Desk) -> None:
    result = desk.run("pull", "ghost", "--out", str(desk.out))
    assert result.exit_code == 1
    assert "no agent that was named runs it" in result.stderr
