"""What people do with the dashboard: follow a request, act, be refused, come back after the session is over."""

import re
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.conftest import System
from tests.support.browser import visiting


@pytest.fixture
def operator(browser: Browser, system: System) -> Iterator[Page]:
    with visiting(browser, system.url, secret=system.secrets["operator"]) as (page, _):
        yield page


@pytest.fixture
def viewer(browser: Browser, system: System) -> Iterator[Page]:
    with visiting(browser, system.url, secret=system.secrets["viewer"]) as (page, _):
        yield page


# Where the middle of the fullest cell is on the screen.
FULLEST_CELL = """() => {
  const heat = document.getElementById("heat"), {data, _fullLayout: {xaxis, yaxis, margin}} = heat;
  const counts = data[0].customdata;
  let best = [0, 0];
  counts.forEach((row, y) => row.forEach((count, x) => { if (count > counts[best[1]][best[0]]) best = [x, y]; }));
  const middle = (axis, edges, k) => (axis.d2p(edges[k]) + axis.d2p(edges[k + 1])) / 2;
  const box = heat.getBoundingClientRect();
  return [
    box.left + xaxis._offset + middle(xaxis, data[0].x, best[0]),
    box.top + yaxis._offset + middle(yaxis, data[0].y, best[1]),
  ];
}"""


def test_a_request_is_followed_from_the_heat_map_to_its_waterfall(operator: Page) -> None:
    operator.goto("/latency?stage=edge.offload")
    expect(operator.locator("#heat .hm")).to_be_visible()

    x, y = operator.evaluate(FULLEST_CELL)
    operator.mouse.move(x, y)
    operator.mouse.click(x, y)
    operator.wait_for_url(re.compile(r"/traces\?stage=edge\.offload.*from_us="))
    operator.locator("#traces tbody a").first.click()

    operator.wait_for_url(re.compile(r"/traces/[0-9a-f]{32}$"))
    tiers = operator.locator(".waterfall td:first-child").all_inner_texts()
    assert {"edge", "gateway", "heavy", "network"} <= {text.strip() for text in tiers}
    stages = operator.locator(".waterfall th[scope=row]").all_inner_texts()
    assert {"queue", "compute", "offload"} <= {text.strip() for text in stages}


def test_the_heat_map_is_used_with_the_keyboard(operator: Page) -> None:
    operator.goto("/latency")
    expect(operator.locator("#heat .hm")).to_be_visible()

    operator.locator("#heat").focus()
    operator.keyboard.press("ArrowLeft")
    expect(operator.locator("#heat-cell")).to_contain_text(" in ")
    operator.keyboard.press("Enter")

    operator.wait_for_url(re.compile(r"/traces\?.*below_us="))
    expect(operator.locator("#traces tbody tr").first).to_be_visible()


def test_a_whole_request_is_drawn_from_the_device_to_ray_and_back(operator: Page, system: System) -> None:
    operator.goto(f"/traces/{system.trace_id}")

    stages = [text.strip() for text in operator.locator(".waterfall th[scope=row]").all_inner_texts()]
    assert stages == [
        "ask digits-nano",
        "to the agent",
        "process digits-nano",
        "queue",
        "compute",
        "offload",
        "to the gateway",
        "infer digits-large",
        "heavy",
        "to the Ray replica",
        "infer digits-large",
        "compute",
        "back to the gateway",
        "back to the agent",
        "back to the device",
    ]


def test_slash_leads_to_the_search_which_finds_devices(operator: Page) -> None:
    operator.goto("/devices")
    operator.keyboard.press("/")
    expect(operator.locator("#search")).to_be_focused()
    operator.keyboard.type("LISBON")
    operator.keyboard.press("Enter")

    operator.wait_for_url(re.compile("q=LISBON"))
    expect(operator.locator("#devices tbody tr")).to_have_count(1)
    operator.locator("#devices tbody a").first.focus()
    operator.keyboard.press("Enter")
    operator.wait_for_url(re.compile("/devices/dock-1"))


def test_the_theme_that_was_chosen_stays(operator: Page) -> None:
    button = operator.locator("#theme")
    button.click()
    button.click()
    expect(button).to_have_text("Theme: dark")
    operator.goto("/models")

    assert operator.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 23)"


def test_an_operator_bans_a_device_and_lifts_the_ban_while_the_page_stays(operator: Page, system: System) -> None:
    operator.goto("/devices/dock-1")
    operator.get_by_role("button", name="Ban this device").click()
    operator.get_by_role("button", name="Cancel").click()
    assert system.device("dock-1")["ban"] is None

    operator.get_by_role("button", name="Ban this device").click()
    operator.get_by_label("Reason").fill("found in a skip")
    operator.get_by_role("button", name="Go on").click()
    expect(operator.locator("#problems")).to_contain_text("found in a skip")
    assert system.device("dock-1")["ban"]["reason"] == "found in a skip"

    operator.get_by_role("button", name="Lift the ban").click()
    operator.get_by_role("button", name="Go on").click()
    expect(operator.locator("#state")).to_have_text("online")
    assert system.device("dock-1")["ban"] is None


def test_a_change_elsewhere_shows_on_an_open_page_and_the_focus_stays(operator: Page, system: System) -> None:
    operator.goto("/devices")
    expect(operator.locator("#live")).to_have_attribute("data-state", "on")
    link = operator.get_by_role("link", name="gate-1")
    link.focus()

    system.http.post("/api/agents/dock-1/ban", json={"reason": "a test"}).raise_for_status()
    try:
        expect(operator.locator("#devices")).to_contain_text("banned")
        expect(link).to_be_focused()
    finally:
        system.http.delete("/api/agents/dock-1/ban").raise_for_status()
    expect(operator.locator("#devices")).not_to_contain_text("banned")


def test_a_viewer_is_told_why_not_and_refused_by_the_server_too(viewer: Page, system: System) -> None:
    viewer.goto("/devices/gate-1")

    expect(viewer.get_by_role("button", name="Ban this device")).to_be_disabled()
    expect(viewer.locator("#actions")).to_contain_text("Your role, viewer, may look")
    status = viewer.evaluate(
        """async () => (await fetch("/api/agents/gate-1/ban", {
          method: "POST",
          headers: {"content-type": "application/json",
                    "x-csrf-token": document.querySelector('meta[name="csrf-token"]').content},
          body: JSON.stringify({reason: "I want to"}),
        })).status"""
    )
    assert status == 403
    assert system.device("gate-1")["ban"] is None


def test_an_action_without_the_token_of_the_session_is_refused(operator: Page, system: System) -> None:
    operator.goto("/devices/gate-1")

    for headers in ({}, {"x-csrf-token": "guessed"}):
        status = operator.evaluate(
            """async (headers) => (await fetch("/api/agents/gate-1/ban", {
              method: "POST", headers: {...headers, "content-type": "application/json"},
              body: JSON.stringify({reason: "forged"}),
            })).status""",
            headers,
        )
        assert status == 403
    assert system.device("gate-1")["ban"] is None


def test_a_page_without_a_session_leads_to_sign_in_and_back(browser: Browser, system: System) -> None:
    context = browser.new_context(base_url=system.url)
    page = context.new_page()
    page.goto("/devices?state=online")
    page.get_by_label("Secret of your credential").fill("nfo1.wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("status")).to_contain_text("not known here")
    page.get_by_label("Secret of your credential").fill(system.secrets["viewer"])
    page.get_by_role("button", name="Sign in").click()

    page.wait_for_url(f"{system.url}/devices?state=online")
    expect(page.locator("#devices")).to_contain_text("gate-1")
    context.close()


def test_an_open_page_says_that_its_session_is_over(operator: Page, system: System) -> None:
    operator.goto("/devices")
    expect(operator.locator("#live")).to_have_attribute("data-state", "on")
    cookies = {each["name"]: each["value"] for each in operator.context.cookies()}

    with httpx.Client(base_url=system.url, cookies=cookies, headers={"origin": system.url}) as same_session:
        token = same_session.get("/api/me").json()["session"]["csrf_token"]
        same_session.delete("/api/sessions/current", headers={"x-csrf-token": token}).raise_for_status()

    # The stream looks whether the session lives every fifteen seconds.
    expect(operator.locator("#ended")).to_contain_text("Your session is over", timeout=25_000)
    operator.get_by_role("link", name="Sign in again").click()
    operator.wait_for_url(re.compile(r"/sign-in\?next=%2Fdevices"))


# What GET /api/audit may answer, and what the page makes of it.
ENTRY = {
    "id": 7,
    "at": "2026-03-01T12:00:00.5+00:00",
    "operator": "eve",
    "role": "admin",
    "action": "agent.ban",
    "target": "gate-1",
    "outcome": "refused",
    "detail": "<b>found</b>",
}


def test_the_audit_log_is_read_page_by_page_and_shown_without_markup(operator: Page) -> None:
    def answer(route: Route) -> None:
        is_first = "before=" not in route.request.url
        entry = {**ENTRY, "id": 7 if is_first else 3}
        route.fulfill(json={"entries": [entry], "next": 7 if is_first else None})

    operator.route("**/api/audit?*", answer)
    operator.goto("/audit")
    expect(operator.locator("#audit tbody tr")).to_have_count(1)
    expect(operator.locator("#audit tbody")).to_contain_text("<b>found</b>")
    operator.get_by_role("button", name="Show earlier ones").click()

    expect(operator.locator("#audit tbody tr")).to_have_count(2)
    expect(operator.locator("#more")).to_be_hidden()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, {"entries": [], "next": None}, "Nothing was changed yet"),
        (403, {"detail": "expected the role operator"}, "expected the role operator"),
        (404, {}, "keeps no audit log"),
        (500, {}, "could not be read"),
    ],
)
def test_the_audit_page_says_what_is_the_matter(
    operator: Page, status: int, body: dict[str, object], words: str
) -> None:
    operator.route("**/api/audit?*", lambda route: route.fulfill(status=status, json=body))
    operator.goto("/audit")

    expect(operator.locator("#audit")).to_contain_text(words)
