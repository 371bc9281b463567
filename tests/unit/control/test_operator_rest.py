"""The operator's REST over real features: what it answers, how it refuses, and that long polls end."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import APIRouter

from controller.api.http_app import create_operator_app
from controller.registry.model import Publication
from controller.traces.model import SpanKind, SpanRecord
from core.clock import SystemClock
from core.digest import digest_of
from core.errors import Overloaded
from core.fleet_state import Problem
from tests.support.operator_side import HOSTILE, MAX_MODEL_BYTES, OperatorSide, ScriptedAgent, operator_side

MODEL = b"the bytes of a model"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest_asyncio.fixture
async def side(tmp_path: Path) -> AsyncIterator[OperatorSide]:
    async with operator_side(tmp_path) as made:
        yield made


@pytest_asyncio.fixture
async def client(side: OperatorSide) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=side.app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {side.secret}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7080", headers=headers) as http:
        yield http


def assert_problem(response: httpx.Response, status: int, code: str, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem.keys() == {"type", "title", "status", "detail", "code"}
    assert (problem["status"], problem["code"]) == (status, code)
    for word in words:
        assert word in problem["detail"]


async def publish(client: httpx.AsyncClient, name: str = "digits", content: bytes = MODEL, **more: Any) -> Any:
    """Publish a model and return the publication when it is over."""
    digest = digest_of(content)
    await client.put(f"/api/blobs/{digest}", content=content)
    body = {"file": {"path": "model.onnx", "digest": digest}, **more}
    response = await client.post(f"/api/models/{name}/versions", json=body)
    assert response.status_code == 202, response.text
    location = response.headers["location"]
    publication = response.json()
    while publication["state"] == "running":
        query = {"wait_s": 10, "seen_at": publication["updated_at"]}
        publication = (await client.get(location, params=query)).json()
    return publication


# ---- blobs ------------------------------------------------------------------------------------------------------


async def test_a_blob_is_new_once(client: httpx.AsyncClient) -> None:
    path = f"/api/blobs/{digest_of(MODEL)}"
    first, again = await client.put(path, content=MODEL), await client.put(path, content=MODEL)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == {"digest": digest_of(MODEL), "size_bytes": len(MODEL)}


async def test_a_blob_can_be_asked_for_without_its_bytes(client: httpx.AsyncClient) -> None:
    path = f"/api/blobs/{digest_of(MODEL)}"
    missing = await client.head(path)
    await client.put(path, content=MODEL)
    present = await client.head(path)
    assert missing.status_code == 404
    assert (present.status_code, present.headers["content-length"]) == (200, str(len(MODEL)))


async def test_bytes_of_another_digest_are_refused(client: httpx.AsyncClient) -> None:
    path = f"/api/blobs/{digest_of(MODEL)}"
    assert_problem(await client.put(path, content=b"others"), 400, "invalid_request", "another digest")
    assert (await client.head(path)).status_code == 404


async def test_a_blob_beyond_the_bound_is_refused_as_it_streams(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield bytes(1 << 20)

    assert_problem(await client.put(f"/api/blobs/{digest_of(MODEL)}", content=endless()), 413, "too_large")
    assert sent <= MAX_MODEL_BYTES + (1 << 20)


async def test_a_malformed_digest_is_refused(client: httpx.AsyncClient) -> None:
    assert_problem(await client.put("/api/blobs/sha256:abc", content=MODEL), 400, "invalid_request", "sha256:")


# ---- models -----------------------------------------------------------------------------------------------------


async def test_a_published_model_is_listed_and_shown(client: httpx.AsyncClient) -> None:
    publication = await publish(client, recipes=["int8-dynamic"])
    assert (publication["state"], publication["version"], publication["done_ratio"]) == ("done", 1, 1.0)
    [listed] = (await client.get("/api/models")).json()["models"]
    assert (listed["name"], listed["latest_version"]) == ("digits", 1)
    shown = (await client.get("/api/models/digits")).json()
    variants = shown["versions"][0]["variants"]
    assert [variant["variant"] for variant in variants] == ["original", "int8-dynamic"]
    assert variants[1]["parent_digest"] == variants[0]["manifest_digest"]
    assert variants[0]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]


async def test_what_was_measured_and_fitted_is_shown(client: httpx.AsyncClient) -> None:
    digest = digest_of(b"data")
    await client.put(f"/api/blobs/{digest}", content=b"data")
    cascade = {
        "escalate_to": "large",
        "score_output": "scores",
        "score_kind": "probabilities",
        "max_error_ratio": 0.01,
    }
    await publish(client, evaluation=digest, cascade=cascade)
    [variant] = (await client.get("/api/models/digits")).json()["versions"][0]["variants"]
    assert (variant["accuracy_ratio"], variant["evaluated_samples"], variant["latency_p50_us"]) == (0.9625, 80, 120.0)
    assert variant["cascade"] == {
        "escalate_to": "large",
        "score_output": "scores",
        "score_kind": "probabilities",
        "temperature": 1.25,
        "threshold": 0.875,
    }


async def test_versions_are_shown_newest_first(client: httpx.AsyncClient) -> None:
    await publish(client)
    await publish(client, content=b"a better one")
    versions = (await client.get("/api/models/digits")).json()["versions"]
    assert [version["version"] for version in versions] == [2, 1]


async def test_a_hostile_model_fails_its_publication_with_the_reason(client: httpx.AsyncClient) -> None:
    publication = await publish(client, content=HOSTILE)
    assert publication["state"] == "failed"
    assert publication["problem"]["code"] == "invalid_request"
    assert "expected an ONNX model" in publication["problem"]["message"]


async def test_publishing_a_blob_that_is_not_here_is_refused(client: httpx.AsyncClient) -> None:
    body = {"file": {"path": "model.onnx", "digest": digest_of(b"never sent")}}
    assert_problem(await client.post("/api/models/digits/versions", json=body), 404, "not_found", "upload it first")


async def test_a_malformed_model_name_is_refused(client: httpx.AsyncClient) -> None:
    body = {"file": {"path": "model.onnx", "digest": digest_of(MODEL)}}
    assert_problem(await client.post("/api/models/.hidden/versions", json=body), 400, "invalid_request", "model")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "body.file"),
        ({"file": {"path": "m.onnx", "digest": "md5:1"}}, "body.file.digest"),
        ({"file": {"path": "m.onnx", "digest": digest_of(MODEL)}, "recipe": []}, "body.recipe"),
        ({"file": {"path": "m.onnx", "digest": digest_of(MODEL)}, "max_batch": 0}, "body.max_batch"),
        ({"file": 1, "extra_files": 2, "recipes": 3, "max_batch": "four", "cascade": 5}, "and 2 more"),
    ],
)
async def test_a_body_that_does_not_fit_is_refused_naming_the_place(
    client: httpx.AsyncClient, body: dict[str, Any], word: str
) -> None:
    assert_problem(await client.post("/api/models/digits/versions", json=body), 400, "invalid_request", word)


async def test_json_that_does_not_say_so_is_refused(client: httpx.AsyncClient) -> None:
    """A page in a browser can post text without being asked; it cannot post JSON."""
    response = await client.post("/api/models/digits/versions", content=b"{}", headers={"content-type": "text/plain"})
    assert_problem(response, 400, "invalid_request")


async def test_a_json_body_beyond_the_bound_is_refused(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post("/api/models/digits/versions", content=b" " * (2 << 20), headers=headers)
    assert_problem(response, 413, "too_large", "1048576 bytes")


async def test_too_many_waiting_publications_are_refused_with_a_time_to_come_again(side: OperatorSide) -> None:
    class FullRegistry:
        async def start_publication(self, *_: object) -> Publication:
            raise Overloaded("publish: 16 publications are waiting; try again later")

    full: Any = FullRegistry()
    app = create_operator_app(
        registry=full,
        fleet=side.fleet,
        traces=side.traces,
        records=side.records,
        trust=side.trust,
        pages=APIRouter(),
        clock=SystemClock(),
        pulls=side.pulls,
        server_version="0",
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        body = {"file": {"path": "model.onnx", "digest": digest_of(MODEL)}}
        response = await client.post("/api/models/digits/versions", json=body)
    assert_problem(response, 429, "overloaded", "try again later")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/api/models/ghost", "/api/publications/none", "/api/agents/ghost", "/api/traces/00"])
async def test_what_is_not_here_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    assert_problem(await client.get(path), 404, "not_found")


# ---- fleet ------------------------------------------------------------------------------------------------------


async def test_a_deployment_names_the_agents_that_it_concerns(client: httpx.AsyncClient, side: OperatorSide) -> None:
    await publish(client)
    agents = [ScriptedAgent("gate-1", "berlin"), ScriptedAgent("gate-2", "munich")]
    for agent in agents:
        await agent.connect(side)
    body = {"target_kind": "site", "target": "berlin", "model": "digits", "variant": "original"}
    response = await client.put("/api/deployments", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["deployment"]["slot"]["version"] == 1
    assert answer["agents"] == [{"id": "gate-1", "position": {"epoch": 1, "generation": 1}}]
    [listed] = (await client.get("/api/deployments")).json()["deployments"]
    assert listed == answer["deployment"]
    for agent in agents:
        await agent.disconnect(side)


async def test_an_agent_is_shown_with_what_it_runs(client: httpx.AsyncClient, side: OperatorSide) -> None:
    await publish(client)
    agent = ScriptedAgent("gate-1", "berlin")
    await agent.connect(side)
    body = {"target_kind": "fleet", "model": "digits", "version": 1, "variant": "original"}
    await client.put("/api/deployments", json=body)
    shown = await _settled(client, "gate-1")
    assert (shown["is_online"], shown["is_in_sync"], shown["site"]) == (True, True, "berlin")
    [report] = shown["slots"]
    assert (report["phase"], report["stored_bytes"], report["total_bytes"]) == ("ready", 100, 100)
    assert report["slot"] == shown["desired_slots"][0]
    await agent.disconnect(side)
    assert (await client.get("/api/agents/gate-1")).json()["is_online"] is False


async def test_what_an_agent_could_not_do_is_shown(client: httpx.AsyncClient, side: OperatorSide) -> None:
    await publish(client)
    agent = ScriptedAgent("gate-1", "berlin", fails_with=Problem("unavailable", "disk is full; free 3 MB"))
    await agent.connect(side)
    await client.put("/api/deployments", json={"target_kind": "fleet", "model": "digits", "variant": "original"})
    shown = await _settled(client, "gate-1")
    assert shown["slots"][0]["problem"] == {"code": "unavailable", "message": "disk is full; free 3 MB"}
    await agent.disconnect(side)


async def test_a_metered_agent_is_permitted_what_it_shall_run(client: httpx.AsyncClient, side: OperatorSide) -> None:
    await publish(client)
    agent = ScriptedAgent("gate-1", "berlin")
    await agent.connect(side)
    await client.put("/api/deployments", json={"target_kind": "fleet", "model": "digits", "variant": "original"})
    permitted = await client.post("/api/agents/gate-1/transfers", json={"model": "digits"})
    await agent.disconnect(side)

    assert permitted.status_code == 200, permitted.text
    assert (permitted.json()["model"], permitted.json()["version"]) == ("digits", 1)


async def test_what_no_agent_shall_run_is_not_permitted(client: httpx.AsyncClient, side: OperatorSide) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    await agent.connect(side)
    await agent.disconnect(side)
    for path in ("/api/agents/gate-1/transfers", "/api/agents/ghost/transfers"):
        refused = await client.post(path, json={"model": "digits"})
        assert refused.status_code == 404


async def _settled(client: httpx.AsyncClient, agent_id: str) -> Any:
    """Wait by long polls until the agent's slots are ready or failed, and return it."""
    found = (await client.get("/api/agents")).json()
    async with asyncio.timeout(10):
        while True:
            [agent] = [agent for agent in found["agents"] if agent["id"] == agent_id]
            if agent["slots"] and all(slot["phase"] in ("ready", "failed") for slot in agent["slots"]):
                return agent
            found = (await client.get("/api/agents", params={"after": found["revision"], "wait_s": 5})).json()


async def test_a_long_poll_answers_when_an_agent_arrives(client: httpx.AsyncClient, side: OperatorSide) -> None:
    before = (await client.get("/api/agents")).json()
    query = {"after": before["revision"], "wait_s": 10}
    waiting = asyncio.create_task(client.get("/api/agents", params=query))
    agent = ScriptedAgent("gate-1", "berlin")
    await agent.connect(side)
    async with asyncio.timeout(5):
        answer = (await waiting).json()
    assert answer["revision"] > before["revision"]
    assert [agent["id"] for agent in answer["agents"]] == ["gate-1"]
    await agent.disconnect(side)


async def test_a_long_poll_for_what_has_changed_already_answers_at_once(
    client: httpx.AsyncClient, side: OperatorSide
) -> None:
    agent = ScriptedAgent("gate-1", "berlin")
    before = (await client.get("/api/agents")).json()
    await agent.connect(side)
    async with asyncio.timeout(5):
        await client.get("/api/agents", params={"after": before["revision"], "wait_s": 10})
    await agent.disconnect(side)


async def test_waiting_longer_than_allowed_is_refused(client: httpx.AsyncClient) -> None:
    assert_problem(await client.get("/api/agents", params={"wait_s": 11}), 400, "invalid_request", "query.wait_s")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"target_kind": "planet"}, 400, "invalid_request"),
        ({"target_kind": "fleet", "target": "berlin"}, 400, "invalid_request"),
        ({"target": "a/b"}, 400, "invalid_request"),
        ({"model": "ghost"}, 404, "not_found"),
        ({"version": 7}, 404, "not_found"),
        ({"version": 1 << 31}, 404, "not_found"),
        ({"version": 1 << 63}, 400, "invalid_request"),
        ({"variant": "int4"}, 404, "not_found"),
    ],
)
async def test_a_deployment_that_does_not_fit_is_refused(
    client: httpx.AsyncClient, change: dict[str, Any], status: int, code: str
) -> None:
    await publish(client)
    body = {"target_kind": "site", "target": "berlin", "model": "digits", "variant": "original", **change}
    assert_problem(await client.put("/api/deployments", json=body), status, code)


# ---- traces -----------------------------------------------------------------------------------------------------


def made_span(span_id: str, parent: str | None, *, service: str, start_us: int, duration_us: int) -> SpanRecord:
    return SpanRecord(
        TRACE_ID,
        span_id,
        parent,
        f"infer {service}",
        SpanKind.SERVER,
        service,
        "host-1",
        start_us,
        duration_us,
        is_error=False,
        attributes={"nanofleet.tier": "edge", "nanofleet.confidence": 0.5},
    )


async def test_recent_traces_are_listed_and_shown(client: httpx.AsyncClient, side: OperatorSide) -> None:
    spans = [
        made_span("00000000000000a1", None, service="nanofleet-agent", start_us=1_000, duration_us=900),
        made_span("00000000000000a2", "00000000000000a1", service="nanofleet-heavy", start_us=1_200, duration_us=300),
    ]
    side.traces.take_in(spans)
    await side.traces.flush()
    [summary] = (await client.get("/api/traces", params={"service": "nanofleet-heavy"})).json()["traces"]
    assert (summary["trace_id"], summary["span_count"], summary["duration_us"]) == (TRACE_ID, 2, 900)
    shown = (await client.get(f"/api/traces/{TRACE_ID}")).json()
    assert [span["parent_span_id"] for span in shown["spans"]] == [None, "00000000000000a1"]
    assert shown["spans"][0]["attributes"]["nanofleet.confidence"] == 0.5
    assert (await client.get("/api/traces", params={"service": "other"})).json() == {"traces": []}


# ---- the whole application --------------------------------------------------------------------------------------


async def test_the_controller_says_that_it_answers(client: httpx.AsyncClient) -> None:
    assert (await client.get("/api/health")).json() == {
        "status": "ok", "version": "0.1.0", "is_restored_unconfirmed": False
    }  # fmt: skip


async def test_open_inference_is_served_beside_in_its_own_words(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2")).json()["name"] == "nanofleet"
    assert (await client.get("/v2/nowhere")).json().keys() == {"error"}


@pytest.mark.parametrize("path", ["/v3", "/v2x", "/api", "/api/health/", "/docs", "/redoc", "/openapi.json"])
async def test_everything_else_is_a_problem(client: httpx.AsyncClient, path: str) -> None:
    assert_problem(await client.get(path), 404, "not_found", path)


async def test_a_wrong_method_is_a_problem(client: httpx.AsyncClient) -> None:
    assert_problem(await client.delete("/api/models"), 405, "invalid_request")


async def test_a_defect_shows_nothing_of_its_inside(side: OperatorSide) -> None:
    class BrokenTraces:
        async def recent(self, *_: object) -> None:
            raise RuntimeError("a secret path")

    broken: Any = BrokenTraces()
    app = create_operator_app(
        registry=side.registry,
        fleet=side.fleet,
        traces=broken,
        records=side.records,
        trust=side.trust,
        pages=APIRouter(),
        clock=SystemClock(),
        pulls=side.pulls,
        server_version="0",
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        response = await client.get("/api/traces")
    assert_problem(response, 500, "internal", "defect")
    assert "secret" not in response.text


async def test_openapi_describes_every_endpoint_and_the_shape_of_refusals(client: httpx.AsyncClient) -> None:
    document = (await client.get("/api/openapi.json")).json()
    assert set(document["paths"]) >= {
        "/api/health",
        "/api/blobs/{digest}",
        "/api/models",
        "/api/models/{name}",
        "/api/models/{name}/versions",
        "/api/publications/{publication_id}",
        "/api/agents",
        "/api/agents/{agent_id}",
        "/api/deployments",
        "/api/traces",
        "/api/traces/{trace_id}",
    }
    assert "ProblemView" in document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["summary"]
            assert operation["tags"]
            assert "422" not in operation["responses"]
