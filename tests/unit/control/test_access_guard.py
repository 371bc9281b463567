"""The gate in front of the HTTP port: who gets through, who does not, and what they are told."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from controller.access.attempts import BURST
from controller.access.model import OperatorRole
from controller.access.service import Access
from controller.api.access import Guarded, caller_of
from core.errors import Unauthenticated
from tests.support.access_store import MemoryAccessStore
from tests.support.audit_store import memory_audit
from tests.support.fleet_values import HeldClock
from tests.support.guarded import OWN_ORIGIN, GuardedSide, guarded_side

VIEWER, OPERATOR, ADMIN = OperatorRole
INFER: dict[str, list[str]] = {"inputs": []}
HERE = {"origin": OWN_ORIGIN, "sec-fetch-site": "same-origin"}


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[GuardedSide]:
    async with guarded_side(tmp_path) as made:
        yield made


async def sign_in(guarded: GuardedSide, browser: httpx.AsyncClient, role: OperatorRole = ADMIN) -> str:
    """Sign in as our own page would; return the CSRF token."""
    response = await browser.post("/api/sessions", json={"secret": guarded.secrets[role]}, headers=HERE)
    assert response.status_code == 201, response.text
    token: str = response.json()["session"]["csrf_token"]
    return token


def assert_refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    for word in words:
        assert word in response.json()["detail"]


# ---- no credential ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/api/models", "/api/openapi.json", "/api/operators", "/api/nothing", "/nothing", "/api/me"]
)
async def test_without_a_credential_nothing_is_told_but_where_to_get_one(guarded: GuardedSide, path: str) -> None:
    response = await guarded.browser().get(path)

    assert_refused(response, 401, "--credential", "/sign-in")
    assert response.headers["www-authenticate"].startswith("Bearer")


async def test_inference_without_a_credential_is_refused_in_the_words_of_its_protocol(guarded: GuardedSide) -> None:
    response = await guarded.browser().post("/v2/models/echo/infer", json=INFER)

    assert response.status_code == 401
    assert response.json().keys() == {"error"}
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/api/health", "/sign-in"])
async def test_health_and_the_sign_in_page_are_open(guarded: GuardedSide, path: str) -> None:
    response = await guarded.browser().get(path, headers={"authorization": "Bearer wrong"})

    assert response.status_code in {200, 503}


async def test_a_wrong_secret_is_refused_and_at_last_told_to_wait(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    answers = [await browser.get("/api/models", headers={"authorization": "Bearer x"}) for _ in range(BURST + 1)]

    assert [answer.status_code for answer in answers] == [401] * BURST + [429]
    assert int(answers[-1].headers["retry-after"]) > 0


@pytest.mark.parametrize("authorization", ["Basic YTpi", "Bearer", "bearer  ", "nfo1.x", ""])
async def test_any_other_authorization_is_refused(guarded: GuardedSide, authorization: str) -> None:
    assert_refused(await guarded.browser().get("/api/models", headers={"authorization": authorization}), 401)


async def test_two_credentials_are_none(guarded: GuardedSide) -> None:
    good = f"Bearer {guarded.secrets[ADMIN]}"
    headers = [("authorization", good), ("authorization", good)]

    assert_refused(await guarded.browser().get("/api/models", headers=headers), 401, "once")


# ---- roles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "method", "path", "may"),
    [
        (VIEWER, "GET", "/api/models", True),
        (VIEWER, "POST", "/v2/repository/index", True),
        (VIEWER, "PUT", "/api/deployments", False),
        (VIEWER, "GET", "/api/operators", False),
        (OPERATOR, "PUT", "/api/deployments", True),
        (OPERATOR, "POST", "/api/operators", False),
        (ADMIN, "GET", "/api/operators", True),
        (ADMIN, "PUT", "/api/deployments", True),
    ],
)
async def test_a_role_may_what_the_table_says(
    guarded: GuardedSide, role: OperatorRole, method: str, path: str, may: bool
) -> None:
    response = await guarded.program(role).request(method, path)

    assert (response.status_code != 403) is may
    assert response.status_code != 401


async def test_the_refusal_names_the_role_that_is_needed(guarded: GuardedSide) -> None:
    response = await guarded.program(VIEWER).put("/api/deployments", json={})

    assert_refused(response, 403, "the-viewer", "role operator", "got viewer")


async def test_what_is_not_in_the_table_is_not_served(guarded: GuardedSide) -> None:
    program = guarded.program(ADMIN)

    assert_refused(await program.get("/api/nothing"), 404, "/api/nothing")
    wrong_method = await program.delete("/api/blobs/sha256:0")
    assert_refused(wrong_method, 405, "HEAD, PUT")
    assert wrong_method.headers["allow"] == "HEAD, PUT"


async def test_below_v2_the_face_answers_for_itself(guarded: GuardedSide) -> None:
    response = await guarded.program(VIEWER).get("/v2/nothing")

    assert response.status_code == 404
    assert response.json().keys() == {"error"}


async def test_the_scheme_of_a_credential_may_be_written_in_any_case(guarded: GuardedSide) -> None:
    headers = {"authorization": f"bEARER {guarded.secrets[VIEWER]}"}

    assert (await guarded.browser().get("/api/models", headers=headers)).status_code == 200


async def test_who_asks_is_told_who_it_is(guarded: GuardedSide) -> None:
    response = await guarded.program(OPERATOR).get("/api/me")

    assert response.json() == {"name": "the-operator", "role": "operator", "session": None}


# ---- browsers ---------------------------------------------------------------------------------------------------


async def test_over_tls_the_cookie_is_bound_to_this_host_and_out_of_reach(guarded: GuardedSide) -> None:
    response = await guarded.browser().post("/api/sessions", json={"secret": guarded.secrets[ADMIN]})
    cookie = response.headers["set-cookie"]

    assert cookie.startswith("__Host-nanofleet-session=")
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"secure", "httponly", "samesite=strict", "path=/"} <= attributes
    assert not any(attribute.startswith("domain") for attribute in attributes)
    assert response.headers["cache-control"] == "no-store"


async def test_in_clear_the_cookie_says_so_and_still_works(guarded: GuardedSide) -> None:
    browser = guarded.browser(origin="http://127.0.0.1:7080")
    response = await browser.post("/api/sessions", json={"secret": guarded.secrets[ADMIN]})

    assert response.headers["set-cookie"].startswith("nanofleet-session=")
    assert "secure" not in response.headers["set-cookie"].lower()
    assert (await browser.get("/api/me")).json()["name"] == "the-admin"


async def test_a_cookie_reads_without_more(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    token = await sign_in(guarded, browser)

    me = (await browser.get("/api/me")).json()
    assert me["name"] == "the-admin"
    assert me["session"]["csrf_token"] == token


async def test_a_cookie_changes_something_only_with_token_and_origin(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    token = await sign_in(guarded, browser)
    body = {"name": "bob", "role": "viewer"}

    assert_refused(await browser.post("/api/operators", json=body, headers=HERE), 403, "X-CSRF-Token")
    with_token = {"x-csrf-token": token}
    assert_refused(await browser.post("/api/operators", json=body, headers=with_token), 403, "Origin")
    wrong = {**HERE, "x-csrf-token": token[:-1]}
    assert_refused(await browser.post("/api/operators", json=body, headers=wrong), 403, "X-CSRF-Token")
    right = {**HERE, **with_token}
    assert (await browser.post("/api/operators", json=body, headers=right)).status_code == 201


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": OWN_ORIGIN.replace("https", "http")},
        {"origin": OWN_ORIGIN.replace("7080", "7081")},
        {"origin": OWN_ORIGIN, "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
    ],
)
async def test_a_page_from_elsewhere_changes_nothing_even_with_the_token(
    guarded: GuardedSide, elsewhere: dict[str, str]
) -> None:
    browser = guarded.browser()
    token = await sign_in(guarded, browser)
    headers = {**elsewhere, "x-csrf-token": token}

    assert_refused(await browser.delete("/api/operators/the-viewer", headers=headers), 403)
    assert len((await browser.get("/api/operators")).json()["operators"]) == 3


async def test_a_page_from_elsewhere_cannot_sign_its_visitor_in(guarded: GuardedSide) -> None:
    body = {"secret": guarded.secrets[VIEWER]}
    response = await guarded.browser().post("/api/sessions", json=body, headers={"origin": "https://evil.example"})

    assert_refused(response, 403, "evil.example")
    assert "set-cookie" not in response.headers


async def test_one_sessions_token_is_of_no_use_to_another(guarded: GuardedSide) -> None:
    mine, other = guarded.browser(), guarded.browser()
    await sign_in(guarded, mine)
    token = await sign_in(guarded, other)

    headers = {**HERE, "x-csrf-token": token}
    assert_refused(await mine.delete("/api/operators/the-viewer", headers=headers), 403)


async def test_a_secret_in_the_header_needs_no_token_and_wins_over_a_cookie(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    await sign_in(guarded, browser, VIEWER)
    headers = {"authorization": f"Bearer {guarded.secrets[ADMIN]}"}

    assert (await browser.delete("/api/operators/the-operator", headers=headers)).status_code == 204


async def test_signing_out_ends_the_session_and_takes_the_cookie(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    token = await sign_in(guarded, browser)
    cookies = dict(browser.cookies)

    response = await browser.delete("/api/sessions/current", headers={**HERE, "x-csrf-token": token})

    assert response.status_code == 204
    assert not browser.cookies
    assert_refused(await guarded.browser().get("/api/me", headers={"cookie": cookie_header(cookies)}), 401, "session")


def cookie_header(cookies: dict[str, str]) -> str:
    return "; ".join(f"{name}={value}" for name, value in cookies.items())


async def test_a_secret_cannot_be_signed_out(guarded: GuardedSide) -> None:
    assert_refused(await guarded.program(VIEWER).delete("/api/sessions/current"), 400, "rotate")


async def test_a_planted_second_cookie_makes_both_worthless(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    await sign_in(guarded, browser)
    cookie = cookie_header(dict(browser.cookies))

    assert_refused(await guarded.browser().get("/api/me", headers={"cookie": f"{cookie}; {cookie}"}), 401)


async def test_the_cookie_of_a_port_in_clear_is_not_taken_over_tls(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    await sign_in(guarded, browser)
    cookie = cookie_header(dict(browser.cookies)).removeprefix("__Host-")

    assert_refused(await guarded.browser().get("/api/me", headers={"cookie": cookie}), 401)


async def test_a_session_of_a_removed_operator_ends_at_once(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    await sign_in(guarded, browser, VIEWER)
    assert (await browser.get("/api/me")).status_code == 200

    assert (await guarded.program(ADMIN).delete("/api/operators/the-viewer")).status_code == 204

    assert_refused(await browser.get("/api/me"), 401)


# ---- operators --------------------------------------------------------------------------------------------------


async def test_an_admin_adds_lists_rotates_and_removes_operators(guarded: GuardedSide) -> None:
    program = guarded.program(ADMIN)
    added = (await program.post("/api/operators", json={"name": "bob", "role": "viewer"})).json()
    bob = guarded.browser()
    bob.headers["authorization"] = f"Bearer {added['secret']}"
    assert (await bob.get("/api/me")).json()["name"] == "bob"
    names = [operator["name"] for operator in (await program.get("/api/operators")).json()["operators"]]
    assert names == ["bob", "the-admin", "the-operator", "the-viewer"]

    rotated = (await program.post("/api/operators/bob/secret")).json()
    assert rotated["secret"] != added["secret"]
    assert_refused(await bob.get("/api/me"), 401)

    assert (await program.delete("/api/operators/bob")).status_code == 204
    assert_refused(await program.delete("/api/operators/bob"), 404)


async def test_the_list_of_operators_shows_no_hash(guarded: GuardedSide) -> None:
    assert "sha256" not in (await guarded.program(ADMIN).get("/api/operators")).text


@pytest.mark.parametrize("body", [{"name": "../x", "role": "viewer"}, {"name": "bob", "role": "root"}, {"name": "bob"}])
async def test_an_operator_that_cannot_be_is_refused(guarded: GuardedSide, body: dict[str, Any]) -> None:
    assert_refused(await guarded.program(ADMIN).post("/api/operators", json=body), 400)


async def test_names_are_unique_and_the_last_admin_stays(guarded: GuardedSide) -> None:
    program = guarded.program(ADMIN)

    assert_refused(await program.post("/api/operators", json={"name": "the-viewer", "role": "admin"}), 409)
    assert_refused(await program.delete("/api/operators/the-admin"), 409, "last")


# ---- the gate itself --------------------------------------------------------------------------------------------


async def test_answers_are_neither_cached_nor_guessed_at(guarded: GuardedSide) -> None:
    response = await guarded.program(VIEWER).get("/api/models")

    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_a_websocket_is_closed(guarded: GuardedSide) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await guarded.app({"type": "websocket", "path": "/api/models", "headers": []}, receive, send)

    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_request_that_went_around_the_gate_has_no_caller() -> None:
    with pytest.raises(Unauthenticated):
        caller_of(Request({"type": "http", "headers": []}))


HEADER_BYTES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"Bearer nfo1." + b"A" * 43, b"bearer \xff\x00", b"__Host-nanofleet-session=" + b"A" * 43]),
    st.integers(0, 20_000).map(lambda size: b"Bearer " + b"a" * size),
    st.integers(0, 3000).map(lambda size: b"nanofleet-session=x; " * size),
)
HEADERS = st.lists(st.tuples(st.sampled_from([b"authorization", b"cookie", b"origin", b"x-csrf-token"]), HEADER_BYTES))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers=HEADERS, scheme=st.sampled_from(["http", "https"]), method=st.sampled_from(["GET", "PUT"]))
async def test_no_header_gets_in_or_breaks_the_gate(
    headers: list[tuple[bytes, bytes]], scheme: str, method: str
) -> None:
    statuses: list[int] = []

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise AssertionError("somebody got in")

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        statuses.append(message.get("status", 0))

    access, audit = Access(MemoryAccessStore(), clock=HeldClock()), memory_audit(HeldClock())
    await access.create("ada", OperatorRole.ADMIN)
    scope = {"type": "http", "method": method, "path": "/api/deployments", "headers": headers, "scheme": scheme}
    await Guarded(app, access, audit)(scope, receive, send)

    assert statuses[0] == 401
