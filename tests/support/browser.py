"""Chromium as an operator uses it: signed in, watched for what it asks of whom and for what it complains about."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, sync_playwright

from tests.support.mosquitto import MissingProgram

CHROMIUM = Path("/usr/bin/chromium")
# Chosen: a page takes well under a second; the two cores may be busy with other tests.
TIMEOUT_MS = 20_000
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Theme = Literal["light", "dark"]


@dataclass(frozen=True, slots=True)
class Screen:
    name: str
    width: int
    height: int


DESKTOP = Screen("desktop", 1280, 860)
PHONE = Screen("phone", 360, 740)


def require_chromium() -> None:
    if not os.access(CHROMIUM, os.X_OK):
        raise MissingProgram(f"{CHROMIUM} is not installed (Debian: apt install chromium)")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a headless Chromium with a profile of its own, which is gone afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watch:
    """What the pages of a context asked for, and what went wrong in them. Without slots: Playwright marks listeners."""

    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def attach(self, context: BrowserContext) -> None:
        context.on("request", self._asked)
        context.on("console", self._said)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))

    def _asked(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob", "about"}:
            self.hosts.add(parts.netloc)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)


@contextmanager
def visiting(
    browser: Browser, url: str, *, secret: str, screen: Screen = DESKTOP, theme: Theme = "light"
) -> Iterator[tuple[Page, Watch]]:
    """Sign in as whoever's secret it is; yields a page that shows the overview."""
    watch = Watch()
    context = browser.new_context(
        base_url=url, viewport={"width": screen.width, "height": screen.height}, color_scheme=theme
    )
    context.set_default_timeout(TIMEOUT_MS)
    watch.attach(context)
    try:
        page = context.new_page()
        page.goto("/")
        page.get_by_label("Secret of your credential").fill(secret)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"{url}/")
        yield page, watch
    finally:
        context.close()
