"""The running system that the browser tests look at: a real controller, real agents, and requests that were asked.

Everything is as `nanofleet demo --keep` leaves it. Screenshots go to `build/screenshots`.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser

from tests.support.browser import chromium, require_chromium
from tests.support.mosquitto import MissingProgram
from tests.support.running_demo import Demo

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
ROLES = ("viewer", "operator")


@dataclass(frozen=True, slots=True)
class System:
    url: str
    # By role.
    secrets: dict[str, str]
    # One that every tier has a span of.
    trace_id: str
    agents: tuple[str, ...]
    http: httpx.Client

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    def device(self, agent_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/api/agents/{agent_id}/identity").raise_for_status().json())


@pytest.fixture(scope="package")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    _require(require_chromium)
    with Demo(tmp_path_factory.mktemp("dashboard"), "--keep") as demo:
        demo.wait_for("running until Ctrl-C")
        figures = demo.figures
        endpoints = figures["endpoints"]
        secret = json.loads(Path(endpoints["credential"]).read_bytes())["secret"]
        url = endpoints["controller_http"]
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {secret}"}) as http:
            secrets = {"admin": secret, **{role: _secret_of(http, role) for role in ROLES}}
            yield System(url, secrets, figures["trace"]["id"], tuple(endpoints["agents"]), http)


def _secret_of(http: httpx.Client, role: str) -> str:
    answer = http.post("/api/operators", json={"name": f"a-{role}", "role": role})
    return str(answer.raise_for_status().json()["secret"])


@pytest.fixture(scope="package")
def browser(system: System) -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="package")
def axe() -> str:
    """The accessibility checker's script."""
    _require(_require_axe)
    return AXE.read_text()


def _require_axe() -> None:
    if not AXE.exists():
        raise MissingProgram(f"{AXE}: run `npm ci` in {AXE.parents[2]}")


def _require(check: Any) -> None:
    """Skip where a program is missing, except in continuous integration, which skips nothing."""
    try:
        check()
    except MissingProgram as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
