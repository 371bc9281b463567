"""Usage and events over the operator's REST, and as the command line shows them."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from controller.records.model import Event, HourUsage, Told
from core.fleet_state import Usage
from core.ids import AgentId
from tests.support.operator_side import OperatorSide, ScriptedAgent, operator_side

HOUR = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
TOLD = Told(HOUR, timedelta())
GATE = AgentId("gate-1")


@pytest.fixture
async def side(tmp_path: Path) -> AsyncIterator[OperatorSide]:
    async with operator_side(tmp_path) as made:
        await ScriptedAgent("gate-1", "berlin").connect(made)
        hours = [HourUsage("boot", HOUR, model, Usage(3, 2, 1, 0), TOLD) for model in ("digits", "")]
        events = [Event(f"{number}", "variant.failed", "digits", "why", 1, TOLD) for number in range(3)]
        await made.records.append(GATE, hours, events)
        yield made


@pytest.fixture
async def client(side: OperatorSide) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=side.app)
    headers = {"authorization": f"Bearer {side.secret}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as made:
        yield made


async def test_usage_of_the_last_days_is_summed_up_by_model(client: httpx.AsyncClient) -> None:
    days = (await client.get("/api/usage")).raise_for_status().json()["days"]

    counts = {"answered_edge": 3, "answered_heavy": 2, "refused": 1, "failed": 0}
    today = HOUR.date().isoformat()
    assert days == [{"day": today, "agent": None, "model": model, **counts} for model in ("", "digits")]


async def test_usage_can_be_asked_for_by_day_agent_and_model(client: httpx.AsyncClient) -> None:
    wanted = {"per": "both", "agent": "gate-1", "model": "digits"}
    days = (await client.get("/api/usage", params=wanted)).raise_for_status().json()["days"]
    past = (await client.get("/api/usage", params={"until": "2020-02-01"})).raise_for_status().json()["days"]

    assert [(day["agent"], day["model"]) for day in days] == [("gate-1", "digits")]
    assert past == []


@pytest.mark.parametrize(
    "wanted", [{"since": "2026-02-01", "until": "2026-01-01"}, {"per": "week"}, {"since": "0001-01-01"}]
)
async def test_usage_that_cannot_be_is_refused(client: httpx.AsyncClient, wanted: dict[str, str]) -> None:
    assert (await client.get("/api/usage", params=wanted)).status_code in {400, 422}


async def test_events_of_an_agent_come_in_pages(client: httpx.AsyncClient) -> None:
    first = (await client.get("/api/agents/gate-1/events", params={"limit": 2})).raise_for_status().json()
    rest = (await client.get("/api/agents/gate-1/events", params={"before": first["next"]})).raise_for_status().json()

    assert [len(page["events"]) for page in (first, rest)] == [2, 1]
    assert rest["next"] is None
    assert first["events"][0]["action"] == "variant.failed"


async def test_events_of_an_agent_that_nobody_knows_are_not_found(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/agents/ghost/events")).status_code == 404
