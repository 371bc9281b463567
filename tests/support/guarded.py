"""The controller's HTTP faces behind the gate, with an operator of every role."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp

from controller.access.model import OperatorRole
from controller.access.service import Access
from controller.api import operators_rest, sign_in
from controller.api.access import Guarded
from controller.api.http_app import ByPrefix, create_operator_app
from controller.api.open_inference_http import create_open_inference_app
from core.clock import SystemClock
from tests.support.access_store import MemoryAccessStore
from tests.support.fleet_values import HeldClock
from tests.support.operator_side import OperatorSide, operator_side

OWN_ORIGIN = "https://controller.example:7080"


@dataclass(frozen=True, slots=True)
class GuardedSide:
    side: OperatorSide
    access: Access
    clock: HeldClock
    operator_app: FastAPI
    app: ASGIApp
    secrets: dict[OperatorRole, str]

    def browser(self, *, origin: str = OWN_ORIGIN) -> httpx.AsyncClient:
        """Return a client of the application; it keeps cookies and sends no credential of its own."""
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=origin)

    def program(self, role: OperatorRole) -> httpx.AsyncClient:
        """Return a client of the application that sends the secret of an operator with `role`."""
        client = self.browser()
        client.headers["authorization"] = f"Bearer {self.secrets[role]}"
        return client


@asynccontextmanager
async def guarded_side(folder: Path) -> AsyncIterator[GuardedSide]:
    async with operator_side(folder) as side:
        clock = HeldClock()
        access = Access(MemoryAccessStore(), clock=clock)
        secrets = {role: (await access.create(f"the-{role.value}", role)).secret for role in OperatorRole}
        operator_app = create_operator_app(
            registry=side.registry, fleet=side.fleet, traces=side.traces, server_version="0.1.0"
        )
        operator_app.include_router(operators_rest.router(access))
        operator_app.include_router(sign_in.pages(access))
        inference = create_open_inference_app(
            side.plane, server_name="nanofleet", server_version="0.1.0", clock=SystemClock()
        )
        app = Guarded(ByPrefix("/v2", inference, otherwise=operator_app), access)
        yield GuardedSide(side, access, clock, operator_app, app, secrets)
