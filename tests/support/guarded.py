"""The controller's HTTP faces behind the gate, with an operator of every role."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from starlette.types import ASGIApp

from controller.access.model import OperatorRole
from controller.access.service import Access
from controller.api.audited import AccessWitness
from controller.api.http_app import create_app
from controller.dashboard.pages import Dashboard
from core.clock import SystemClock
from tests.support.access_store import MemoryAccessStore
from tests.support.fleet_values import HeldClock
from tests.support.operator_side import OperatorSide, faces_of, operator_side

OWN_ORIGIN = "https://controller.example:7080"


@dataclass(frozen=True, slots=True)
class GuardedSide:
    side: OperatorSide
    access: Access
    clock: HeldClock
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
        access.watched_by(AccessWitness(side.trust.audit))
        secrets = {role: (await access.create(f"the-{role.value}", role)).secret for role in OperatorRole}
        app = create_app(
            plane=side.plane,
            registry=side.registry,
            fleet=side.fleet,
            traces=side.traces,
            records=side.records,
            pulls=side.pulls,
            trust=faces_of(access, side.trust.audit),
            pages=Dashboard(side.sources, access, version="0.1.0").router(),
            clock=SystemClock(),
            server_name="nanofleet",
            server_version="0.1.0",
        )
        yield GuardedSide(side, access, clock, app, secrets)
