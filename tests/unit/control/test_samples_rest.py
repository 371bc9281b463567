"""The REST for hard examples, behind the gate: who may what, what is recorded, and what bodies are refused."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from controller.access.model import OperatorRole
from controller.fleet.sessions import Session
from core.digest import digest_of
from core.ids import AgentId
from core.samples import SampleCount, SampleCounts, SampleName, SampleOffer
from tests.support.fleet_values import made_hello
from tests.support.guarded import GuardedSide, guarded_side
from tests.support.hard_examples import made_file

CAM = AgentId("cam-1")
CONTENT = made_file()[1]
DIGEST = digest_of(CONTENT)


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[GuardedSide]:
    async with guarded_side(tmp_path) as side:
        yield side


async def heard(guarded: GuardedSide, session: Session) -> None:
    counts = SampleCounts((SampleCount("digits", 7, "tied", 3),), 2, 900)
    guarded.side.fleet.samples.heard(session, counts)


async def pulled(guarded: GuardedSide, client: httpx.AsyncClient, **body: object) -> httpx.Response:
    return await client.post("/api/models/digits/sample-pulls", json={"agents": [CAM], **body})


async def delivered(guarded: GuardedSide, pull_id: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield CONTENT

    name = SampleName(DIGEST, len(CONTENT))
    offer = SampleOffer(pull_id, (name,))
    await guarded.side.pulls.offer(CAM, offer)
    await guarded.side.pulls.receive(CAM, pull_id, name, chunks())
    await guarded.side.pulls.offer(CAM, offer)


async def test_a_viewer_sees_how_many_there_are_and_nothing_of_them(guarded: GuardedSide) -> None:
    async with guarded.side.fleet.session(made_hello()) as (session, _):
        await heard(guarded, session)
        async with guarded.program(OperatorRole.VIEWER) as viewer:
            shown = (await viewer.get("/api/samples")).json()
            refused = [
                await viewer.get("/api/sample-pulls"),
                await viewer.get(f"/api/sample-pulls/{'0' * 32}"),
                await viewer.get(f"/api/sample-pulls/{'0' * 32}/samples/cam-1/{DIGEST}"),
                await viewer.delete(f"/api/sample-pulls/{'0' * 32}"),
                await pulled(guarded, viewer),
            ]
    row = {"agent": "cam-1", "is_online": True, "model": "digits", "label": 7, "reason": "tied", "samples": 3}
    assert shown == {"counts": [row], "other": 2, "size_bytes": 900}
    assert {answer.status_code for answer in refused} == {403}


async def test_an_operator_pulls_waits_and_fetches_byte_by_byte(guarded: GuardedSide) -> None:
    async with guarded.side.fleet.session(made_hello()), guarded.program(OperatorRole.OPERATOR) as operator:
        made = await pulled(guarded, operator, limit=5)
        assert made.status_code == 201
        pull = made.json()
        assert (pull["model"], pull["limit"], pull["asked_by"]) == ("digits", 5, "the-operator")
        assert [each["state"] for each in pull["deliveries"]] == ["waiting"]
        await delivered(guarded, pull["id"])
        found = (await operator.get(f"/api/sample-pulls/{pull['id']}")).json()
        assert found["samples"] == [{"agent": "cam-1", "digest": DIGEST, "size_bytes": len(CONTENT)}]
        assert found["pull"]["deliveries"][0] == {
            "agent": "cam-1",
            "is_online": True,
            "state": "delivered",
            "reason": "",
            "offered": 1,
            "samples": 1,
            "size_bytes": len(CONTENT),
        }
        path = f"/api/sample-pulls/{pull['id']}/samples/cam-1/{DIGEST}"
        assert (await operator.get(path)).content == CONTENT
        assert [each["id"] for each in (await operator.get("/api/sample-pulls")).json()["pulls"]] == [pull["id"]]
        assert (await operator.delete(f"/api/sample-pulls/{pull['id']}")).status_code == 204
        assert (await operator.get(path)).status_code == 404


async def test_every_pull_leaves_a_record_of_who_wanted_what_from_whom(guarded: GuardedSide) -> None:
    async with guarded.side.fleet.session(made_hello()), guarded.program(OperatorRole.OPERATOR) as operator:
        pull = (await pulled(guarded, operator)).json()
        await operator.delete(f"/api/sample-pulls/{pull['id']}")
        entries = (await operator.get("/api/audit")).json()["entries"]
    recorded = {entry["action"]: entry for entry in entries}
    assert recorded["samples.pull"]["target"] == "digits"
    assert "from cam-1" in recorded["samples.pull"]["detail"]
    assert pull["id"] in recorded["samples.pull"]["detail"]
    assert recorded["samples.drop"]["target"] == pull["id"]


@pytest.mark.parametrize(
    "body",
    [
        {"limit": 0},
        {"limit": 100_000},
        {"site": "north"},
        {"agents": ["../x"]},
        {"agents": ["cam-1"] * 65},
        {"lifetime_s": 1},
        {"since": "2026-01-01T00:00:00"},
        {"colour": "red"},
    ],
)
async def test_a_body_that_says_too_much_or_nothing_clear_is_refused(
    guarded: GuardedSide, body: dict[str, object]
) -> None:
    async with guarded.side.fleet.session(made_hello()), guarded.program(OperatorRole.OPERATOR) as operator:
        assert (await pulled(guarded, operator, **body)).status_code == 400
        assert not guarded.side.pulls.pulls()


async def test_an_agent_that_nobody_knows_and_a_model_that_nobody_runs_are_not_found(guarded: GuardedSide) -> None:
    async with guarded.program(OperatorRole.OPERATOR) as operator:
        assert (await pulled(guarded, operator)).status_code == 404
        assert (await pulled(guarded, operator, agents=[])).status_code == 404
