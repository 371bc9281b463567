"""The page on which a person signs in: a form that works without scripts, and leads back to what was asked for."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from controller.access.model import OperatorRole
from tests.support.guarded import OWN_ORIGIN, GuardedSide, guarded_side

HERE = {"origin": OWN_ORIGIN}


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[GuardedSide]:
    async with guarded_side(tmp_path) as made:
        yield made


async def signed_in(guarded: GuardedSide) -> httpx.AsyncClient:
    browser = guarded.browser()
    form = {"secret": f" {guarded.secrets[OperatorRole.VIEWER]}\n"}
    response = await browser.post("/sign-in", data=form, headers=HERE)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    return browser


async def test_the_form_leads_to_a_page_that_says_who_is_signed_in(guarded: GuardedSide) -> None:
    browser = await signed_in(guarded)

    assert "Signed in as <strong>the-viewer</strong> (viewer)" in (await browser.get("/sign-in")).text
    assert (await browser.get("/api/me")).json()["name"] == "the-viewer"


async def test_the_page_runs_only_our_files_stands_in_no_frame_and_stays_in_no_cache(guarded: GuardedSide) -> None:
    response = await guarded.browser().get("/sign-in")
    policy = response.headers["content-security-policy"]

    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "form-action 'self'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"


async def test_a_wrong_secret_shows_the_form_again_with_the_reason(guarded: GuardedSide) -> None:
    response = await guarded.browser().post("/sign-in", data={"secret": "<script>"}, headers=HERE)

    assert response.status_code == 401
    assert "not known here" in response.text
    assert "<form" in response.text
    assert "<script>" not in response.text
    assert "set-cookie" not in response.headers


async def test_what_a_page_from_elsewhere_sends_is_refused_and_shown_without_its_markup(guarded: GuardedSide) -> None:
    form = {"secret": guarded.secrets[OperatorRole.VIEWER]}
    response = await guarded.browser().post("/sign-in", data=form, headers={"origin": "https://<b>evil</b>"})

    assert response.status_code == 403
    assert "<b>" not in response.text


async def test_what_is_no_form_is_refused(guarded: GuardedSide) -> None:
    for body in (b"\xff", b"a", b"&".join([b"a=b"] * 100)):
        response = await guarded.browser().post("/sign-in", content=body, headers=HERE)
        assert response.status_code == 400
    assert (await guarded.browser().post("/sign-in", content=b"a" * 5000, headers=HERE)).status_code == 413


async def test_the_button_signs_out(guarded: GuardedSide) -> None:
    browser = await signed_in(guarded)
    page = (await browser.get("/sign-in")).text
    token = re.search(r'name="csrf_token" value="([^"]+)"', page)
    assert token is not None

    response = await browser.post("/sign-out", data={"csrf_token": token[1]}, headers=HERE)

    assert response.status_code == 303
    assert not browser.cookies
    assert "Secret of your credential" in (await browser.get("/sign-in")).text


async def test_nobody_else_can_press_the_button(guarded: GuardedSide) -> None:
    browser = await signed_in(guarded)

    assert (await browser.post("/sign-out", data={"csrf_token": "x"}, headers=HERE)).status_code == 403
    assert (await browser.post("/sign-out", data={"csrf_token": "x"})).status_code == 403
    assert (await browser.get("/api/me")).status_code == 200


async def test_who_asked_for_a_page_gets_there_after_signing_in(guarded: GuardedSide) -> None:
    browser = guarded.browser()
    asked = await browser.get("/devices?state=online&q=a%20b")
    assert (asked.status_code, asked.headers["location"]) == (
        303,
        "/sign-in?next=%2Fdevices%3Fstate%3Donline%26q%3Da%2520b",
    )

    form = await browser.get(asked.headers["location"])
    found = re.search(r'name="next" value="([^"]+)"', form.text)
    assert found is not None
    fields = {"secret": guarded.secrets[OperatorRole.VIEWER], "next": found[1].replace("&amp;", "&")}
    response = await browser.post("/sign-in", data=fields, headers=HERE)

    assert (response.status_code, response.headers["location"]) == (303, "/devices?state=online&q=a%20b")
    assert (await browser.get(response.headers["location"])).status_code == 200


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "/\t/evil.example",
        "javascript:alert(1)",
        "evil",
        "",
        "/" + "a" * 2000,
        "/\u00e9",
        "/a\r\nset-cookie: a=b",
    ],
)
async def test_nobody_is_led_elsewhere(guarded: GuardedSide, elsewhere: str) -> None:
    fields = {"secret": guarded.secrets[OperatorRole.VIEWER], "next": elsewhere}
    response = await guarded.browser().post("/sign-in", data=fields, headers=HERE)

    assert (response.status_code, response.headers["location"]) == (303, "/")


async def test_programs_are_told_and_not_led_anywhere(guarded: GuardedSide) -> None:
    wrong = {"authorization": "Bearer nfo1.wrong"}

    assert (await guarded.browser().get("/devices", headers=wrong)).status_code == 401
    assert (await guarded.browser().get("/api/agents")).status_code == 401
    assert (await guarded.browser().get("/dashboard/latency")).status_code == 401
    assert (await guarded.browser().get("/nothing")).status_code == 401
