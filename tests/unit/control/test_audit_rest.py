"""What operators ask for leaves a record, whatever comes of it; and the record is read over REST."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from starlette.types import Receive, Scope, Send

from controller.access.model import Caller, Operator, OperatorRole
from controller.api.access_cookies import SAFE_METHODS
from controller.api.access_rules import RULES, is_inference
from controller.api.audited import Audited
from controller.api.audited_actions import ACTIONS, UNRECORDED, asked_by
from controller.audit.model import Filter
from core.errors import Unavailable
from tests.support.audit_store import MemoryAuditStore, memory_audit
from tests.support.fleet_values import NOON, HeldClock
from tests.support.guarded import GuardedSide, guarded_side

VIEWER, OPERATOR, ADMIN = OperatorRole
DEPLOYMENT = {"target_kind": "fleet", "target": "", "model": "absent", "version": 1, "variant": "fp32"}


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[GuardedSide]:
    async with guarded_side(tmp_path) as made:
        yield made


async def recorded(guarded: GuardedSide, query: str = "") -> list[dict[str, Any]]:
    async with guarded.program(OPERATOR) as client:
        response = await client.get(f"/api/audit{query}")
    assert response.status_code == 200, response.text
    entries: list[dict[str, Any]] = response.json()["entries"]
    return entries


def test_every_endpoint_that_changes_something_is_recorded_or_has_a_reason_not_to_be() -> None:
    changing = {
        (method, path)
        for path, methods in RULES.items()
        for method in methods
        if method not in SAFE_METHODS and not is_inference(path)
    }
    named = {(method, path) for path, methods in ACTIONS.items() for method in methods}

    assert named | set(UNRECORDED) == changing
    assert not named & set(UNRECORDED)


def test_the_target_is_what_the_path_names() -> None:
    assert asked_by("POST", "/api/agents/gate-1/ban") == ("agent.ban", "gate-1")
    assert asked_by("POST", "/api/operators") == ("operator.add", "")
    assert asked_by("GET", "/api/agents/gate-1/ban") is None


async def test_a_change_is_recorded_with_who_what_and_how_it_ended(guarded: GuardedSide) -> None:
    async with guarded.program(ADMIN) as client:
        assert (await client.post("/api/operators", json={"name": "eve", "role": "viewer"})).status_code == 201
        assert (await client.post("/api/operators", json={"name": "eve", "role": "viewer"})).status_code == 409

    refused, made = await recorded(guarded, "?action=operator.add")
    assert made == {
        "id": made["id"], "at": made["at"], "operator": "the-admin", "role": "admin", "action": "operator.add",
        "target": "eve", "outcome": "ok", "code": "", "detail": "role viewer", "source": "127.0.0.1",
    }  # fmt: skip
    assert (refused["outcome"], refused["code"], refused["target"]) == ("refused", "conflict", "eve")


async def test_a_secret_is_never_in_the_record(guarded: GuardedSide) -> None:
    async with guarded.program(ADMIN) as client:
        secret = (await client.post("/api/operators", json={"name": "eve", "role": "viewer"})).json()["secret"]

    assert secret not in str(await recorded(guarded))


async def test_what_a_body_names_is_the_target(guarded: GuardedSide) -> None:
    async with guarded.program(OPERATOR) as client:
        assert (await client.put("/api/deployments", json=DEPLOYMENT)).status_code == 404

    (entry,) = await recorded(guarded, "?action=deployment.put")
    assert (entry["target"], entry["detail"], entry["code"]) == ("fleet", "absent 1 fp32", "not_found")


async def test_a_refusal_by_role_is_recorded(guarded: GuardedSide) -> None:
    async with guarded.program(VIEWER) as client:
        assert (await client.post("/api/agents/gate-1/ban", json={"reason": "mine"})).status_code == 403

    (entry,) = await recorded(guarded, "?operator=the-viewer")
    assert (entry["action"], entry["target"], entry["outcome"], entry["code"]) == (
        "agent.ban", "gate-1", "refused", "forbidden"
    )  # fmt: skip


async def test_failed_and_good_sign_ins_are_recorded(guarded: GuardedSide) -> None:
    async with guarded.browser() as browser:
        assert (await browser.post("/api/sessions", json={"secret": "nfo1.wrong"})).status_code == 401
        assert (await browser.post("/api/sessions", json={"secret": guarded.secrets[VIEWER]})).status_code == 201

    opened, failed = (await recorded(guarded))[:2]
    assert (opened["action"], opened["operator"]) == ("session.open", "the-viewer")
    assert (failed["action"], failed["operator"], failed["code"]) == (
        "credential.show", "(unknown)", "unauthenticated"
    )  # fmt: skip


async def test_viewers_do_not_read_the_record(guarded: GuardedSide) -> None:
    async with guarded.program(VIEWER) as client:
        assert (await client.get("/api/audit")).status_code == 403
        assert (await client.get("/api/audit/verification")).status_code == 403


async def test_pages_are_followed_by_next(guarded: GuardedSide) -> None:
    async with guarded.program(ADMIN) as client:
        for number in range(3):
            await client.post("/api/operators", json={"name": f"eve-{number}", "role": "viewer"})
        first = (await client.get("/api/audit?limit=2")).json()
        rest = (await client.get(f"/api/audit?limit=2&before={first['next']}")).json()

    assert [entry["target"] for entry in first["entries"] + rest["entries"]] == ["eve-2", "eve-1", "eve-0"]
    assert rest["next"] is None


async def test_the_chain_is_verified_with_its_head(guarded: GuardedSide) -> None:
    async with guarded.program(ADMIN) as client:
        await client.post("/api/operators", json={"name": "eve", "role": "viewer"})
        found = (await client.get("/api/audit/verification")).json()
        head = {"head_id": found["last"]["id"], "head_sha256": found["last"]["sha256"]}
        assert (await client.get("/api/audit/verification", params=head)).json()["problem"] is None
        head["head_sha256"] = "0" * 64
        assert "noted hash" in (await client.get("/api/audit/verification", params=head)).json()["problem"]
        assert (await client.get("/api/audit/verification?head_id=1")).status_code == 400


def changing_scope() -> Scope:
    caller = Caller(Operator("ada", ADMIN, "a" * 64, NOON))
    return {"type": "http", "method": "POST", "path": "/api/operators/eve/secret", "state": {"caller": caller}}


async def test_what_cannot_be_recorded_is_not_done() -> None:
    class Full(MemoryAuditStore):
        async def run(self, use_case: object) -> Any:
            raise Unavailable("database: full")

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise AssertionError("it was done")

    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    audit = memory_audit(HeldClock(), store=Full())
    await Audited(app, audit)(changing_scope(), _nothing, send)

    assert statuses[0] == 503


async def test_a_defect_is_recorded_as_failed() -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError

    audit = memory_audit(HeldClock())
    with pytest.raises(ZeroDivisionError):
        await Audited(app, audit)(changing_scope(), _nothing, _nothing)

    (entry,) = (await audit.entries(Filter(10))).entries
    assert (entry.result.outcome, entry.result.code, entry.act.target) == ("failed", "internal", "eve")


async def _nothing(*_: Any) -> Any:
    raise AssertionError("nothing is read or sent")
