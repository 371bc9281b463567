"""Every page with what a running system has: it looks right, complains of nothing, and everybody can use it."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import SCREENSHOTS, System
from tests.support.browser import DESKTOP, PHONE, Screen, Theme, Watch, visiting

Visit = tuple[Page, Watch, Screen, Theme]

PAGES = {
    "overview": "/",
    "latency": "/latency",
    "traces": "/traces",
    "trace": "/traces/{trace}",
    "devices": "/devices",
    "device": "/devices/{agent}",
    "models": "/models",
    "model": "/models/digits-nano",
    "audit": "/audit",
    "nothing": "/devices/nobody",
}
# What stands on a page only when it has its data.
PROOFS = {
    "overview": "Latency by tier",
    "latency": "edge offload",
    "traces": "ask digits-nano",
    "trace": "back to the device",
    "devices": "gate-1",
    "device": "int8-static",
    "models": "digits-large",
    "model": "from original",
    "audit": "Who did what",
    "nothing": "never seen here",
}
# What a browser says of these pages although nothing is wrong: that the thing looked for is not there (404), and that
# the charting library may not add its style for maps, of which we draw none.
EXPECTED = {"nothing": "404", "audit": "404", "latency": "Applying inline style violates"}


@pytest.fixture(
    scope="module",
    params=[(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")],
    ids=lambda each: f"{each[0].name}-{each[1]}",
)
def visit(request: pytest.FixtureRequest, browser: Browser, system: System) -> Iterator[Visit]:
    screen, theme = request.param
    with visiting(browser, system.url, secret=system.secrets["operator"], screen=screen, theme=theme) as (page, watch):
        yield page, watch, screen, theme


def show(page: Page, name: str, system: System) -> None:
    """Go to a page and wait until all of it is there."""
    page.goto(PAGES[name].format(trace=system.trace_id, agent=system.agents[0]))
    expect(page.locator("main")).to_contain_text(PROOFS[name])
    expect(page.locator(".loading")).to_have_count(0)
    if name == "latency":
        expect(page.locator("#percentiles .trace.scatter")).to_have_count(3)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_its_data_within_the_screen_and_without_complaint(visit: Visit, system: System, name: str) -> None:
    page, watch, screen, theme = visit
    watch.complaints.clear()

    show(page, name, system)

    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}-{screen.name}-{theme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= screen.width
    assert [text for text in watch.complaints if EXPECTED.get(name, "nothing is") not in text] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_serious_fault_of_accessibility(visit: Visit, system: System, axe: str, name: str) -> None:
    page, *_ = visit

    show(page, name, system)

    # By the debugger: the page's own policy would let no script of ours in.
    page.evaluate(axe)
    found: dict[str, Any] = page.evaluate("axe.run()")
    serious = [fault for fault in found["violations"] if fault["impact"] in {"serious", "critical"}]
    assert [(fault["id"], [node["html"][:160] for node in fault["nodes"][:3]]) for fault in serious] == []
    assert found["passes"]


def test_the_page_to_sign_in_on_has_no_serious_fault(browser: Browser, system: System, axe: str) -> None:
    for theme in ("light", "dark"):
        for screen in (DESKTOP, PHONE):
            size = {"width": screen.width, "height": screen.height}
            context = browser.new_context(base_url=system.url, color_scheme=theme, viewport=size)  # type: ignore[arg-type]  # both literals
            page = context.new_page()
            page.goto("/devices")
            page.screenshot(path=SCREENSHOTS / f"sign-in-{screen.name}-{theme}.png")
            page.evaluate(axe)
            faults = page.evaluate("axe.run()")["violations"]
            assert [fault["id"] for fault in faults if fault["impact"] in {"serious", "critical"}] == []
            context.close()


def test_no_request_leaves_the_machine(visit: Visit, system: System) -> None:
    page, watch, *_ = visit

    for name in PAGES:
        show(page, name, system)

    assert watch.hosts == {system.host}
