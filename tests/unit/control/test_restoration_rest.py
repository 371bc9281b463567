"""The word after a restore: what it does to the catalogue, and what the operator is told before and after."""

import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from controller.api import restoration_rest
from controller.api.notices import Noticed
from controller.api.problems import exception_handlers, problem_answer
from controller.api.restoration_views import NOTICE_HEADER, RESTORED
from controller.signing.keys import KeyFiles, KeyRing
from controller.signing.service import Catalogue
from core.fleet_state import AgentHello, CatalogueVersions
from tests.support.catalogues import MemoryCatalogueStore
from tests.support.fleet_values import METER, made_hello, made_report, made_slot
from tests.unit.control.test_fleet_restoration import restored
from tests.unit.control.test_fleet_service import SECOND, World


class Desk:
    """A restored fleet and a catalogue of its own, behind their REST."""

    def __init__(self, world: World, catalogue: Catalogue, keys: Path) -> None:
        self.world = world
        self.catalogue = catalogue
        self.keys = keys
        app = FastAPI(exception_handlers=exception_handlers(problem_answer))
        app.include_router(restoration_rest.router(world.fleet, catalogue))
        transport = httpx.ASGITransport(app=Noticed(app, world.fleet))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://controller")

    async def confirm(self) -> httpx.Response:
        return await self.client.post("/api/restoration/confirmation")


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    world = await restored()
    catalogue = Catalogue(MemoryCatalogueStore(), KeyRing(KeyFiles(tmp_path / "keys")), clock=world.clock)
    await catalogue.prepare()
    made = Desk(world, catalogue, tmp_path / "keys")
    yield made
    await made.client.aclose()


def hello_with(root: int, timestamp: int) -> AgentHello:
    return replace(made_hello(applied=SECOND), catalogue=CatalogueVersions(root, timestamp))


async def test_the_word_gives_the_catalogue_new_online_keys(desk: Desk) -> None:
    before = desk.catalogue.versions()
    response = await desk.confirm()

    assert response.json() == {
        "epoch": 2, "catalogue": "The catalogue has new online keys, so that agents that saw a later one accept it."
    }  # fmt: skip
    assert desk.catalogue.versions().root == before.root + 2


async def test_root_keys_that_are_elsewhere_are_asked_for(desk: Desk) -> None:
    shutil.move(desk.keys / "root", desk.keys.parent / "safe")
    response = await desk.confirm()

    assert "nanofleet signing stage" in response.json()["catalogue"]
    assert [each.role for each in (await desk.catalogue.status()).staged] == ["root"]


async def test_a_root_that_is_missing_here_is_told_and_not_signed_past(desk: Desk) -> None:
    await desk.world.visit(hello_with(root=2, timestamp=9))
    before = desk.catalogue.versions()
    drift = (await desk.client.get("/api/restoration")).json()
    response = await desk.confirm()

    assert (drift["root_is_behind"], drift["catalogue_is_behind"]) == (True, True)
    assert "newer root of trust" in response.json()["catalogue"]
    assert desk.catalogue.versions() == before


async def test_the_word_is_refused_when_none_is_waited_for_and_changes_no_key(desk: Desk) -> None:
    await desk.confirm()
    before = desk.catalogue.versions()

    assert (await desk.confirm()).status_code == 409
    assert desk.catalogue.versions() == before


async def test_every_answer_has_the_notice_until_the_word(desk: Desk) -> None:
    before = await desk.client.get("/api/nothing-here")
    await desk.confirm()
    after = await desk.client.get("/api/restoration")

    assert before.headers[NOTICE_HEADER] == RESTORED
    assert NOTICE_HEADER not in after.headers


async def test_the_drift_shows_what_runs_beside_what_is_wanted(desk: Desk) -> None:
    async with desk.world.online(hello_with(root=1, timestamp=1)) as session:
        desk.world.fleet.reported(session, made_report(SECOND, made_slot(METER, 2)))
        drift = (await desk.client.get("/api/restoration")).json()

    (agent,) = drift["ahead"]
    assert ([slot["version"] for slot in agent["runs"]], [slot["version"] for slot in agent["wants"]]) == ([2], [1])
    assert (drift["is_watching"], drift["ahead_count"], drift["catalogue_is_behind"]) == (True, 1, False)
