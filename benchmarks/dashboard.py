"""The dashboard's pages with a large fleet and many spans behind them, asked over HTTP one after the other.

    python -m benchmarks.dashboard --json

Real stores (SQLite files), a real HTTP port, a signed-in operator. 2,000 devices with two models each and an identity,
100,000 spans of 14,000 requests within the last hour. Meanwhile one agent reports progress ten times a second, so that
the fleet never stays as it was. Each figure is the time from request to the last byte of the answer; p95 per page.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import uvloop

from controller.access.model import OperatorRole
from controller.access.service import Access
from controller.api.access import Guarded
from controller.api.http_app import TrustFaces, create_operator_app
from controller.api.http_server import HttpServer
from controller.dashboard.pages import Dashboard
from controller.dashboard.sources import Sources
from controller.fleet.model import Agent
from controller.fleet.service import Fleet
from controller.identity.model import AgentIdentity, PublicKey
from controller.identity.store import IdentityRecords
from controller.identity.use_cases import known_identity
from controller.registry.service import Registry
from controller.storage.access import SqlAccessStore
from controller.storage.database import Database
from controller.storage.fleet import SqlFleetStore
from controller.storage.identity import SqlIdentityStore
from controller.storage.registry import SqlRegistryStore
from controller.storage.traces import SqlTraceStore
from controller.traces.model import SpanKind, SpanRecord
from controller.traces.service import Traces
from controller.traces.statistics import Statistics
from core.addresses import Address
from core.clock import SystemClock
from core.fleet_state import (
    NOWHERE,
    AgentHello,
    DesiredState,
    Position,
    Problem,
    ReportedState,
    SlotPhase,
    SlotReport,
    Transfer,
)
from core.ids import AgentId, ModelName, SiteId, VariantName
from tests.support.fleet_values import made_slot
from tests.support.operator_side import NoSigning, audit_over
from tests.support.registry_values import made_publication, made_version
from tests.support.releases import OpenCatalogue

GOAL_P95_MS = 100
SITES = 40
MODELS = tuple(ModelName(f"model-{number}") for number in range(12))
INT8 = VariantName("int8-static")
START_TIMEOUT_S = 120.0
REPORT_EVERY_S = 0.1
SPANS_PER_REQUEST = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--devices", type=int, default=2_000)
    parser.add_argument("--spans", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=60, help="of each page, after one that does not count")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder,
        running(Path(folder), devices=arguments.devices, spans=arguments.spans) as (url, secret, trace_id),
    ):
        pages = measure(url, secret, trace_id, requests=arguments.requests)
    worst = max(page["p95_ms"] for page in pages.values())
    figures = {
        "benchmark": "dashboard",
        "p95_ms": worst,
        "goal_p95_ms": GOAL_P95_MS,
        "pages": pages,
        "devices": arguments.devices,
        "spans": arguments.spans,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


# ---- asking ------------------------------------------------------------------------------------------------------


def measure(url: str, secret: str, trace_id: str, *, requests: int) -> dict[str, dict[str, float]]:
    """Return p50 and p95 of every page, in milliseconds, and its size; pages take turns."""
    paths = {
        "overview": "/",
        "latency": "/latency",
        "latency, one model": f"/latency?range=6h&model={MODELS[0]}&stage=edge.compute",
        "latency figures": "/dashboard/latency",
        "traces": "/traces",
        "traces of a cell": "/traces?stage=edge.offload&at_least_us=9000&below_us=12000",
        "trace": f"/traces/{trace_id}",
        "devices": "/devices",
        "devices, searched": "/devices?q=site-7&state=attention&page=2",
        "device": "/devices/device-0042",
        "models": "/models",
        "model": f"/models/{MODELS[0]}",
        "audit": "/audit",
    }
    times: dict[str, list[float]] = {name: [] for name in paths}
    sizes: dict[str, int] = {}
    with httpx.Client(base_url=url, timeout=30.0) as http:
        answer = http.post("/sign-in", data={"secret": secret}, headers={"origin": url})
        assert answer.status_code == 303, answer.text
        # The first round loads templates, and takes the spans of the whole store in.
        for turn in range(requests + 1):
            for name, path in paths.items():
                started_s = time.perf_counter()
                answer = http.get(path)
                taken_ms = (time.perf_counter() - started_s) * 1000
                assert answer.status_code == 200, (path, answer.text[:300])
                sizes[name] = len(answer.content)
                if turn:
                    times[name].append(taken_ms)
    return {
        name: {
            "p50_ms": round(float(np.percentile(taken, 50)), 1),
            "p95_ms": round(float(np.percentile(taken, 95)), 1),
            "max_ms": round(max(taken), 1),
            "bytes": sizes[name],
        }
        for name, taken in times.items()
    }


# ---- what is asked -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredIdentities:
    """What `Identity` reads, without the keys and authorities that it has beside."""

    store: SqlIdentityStore

    async def identities(self) -> Sequence[AgentIdentity]:
        return await self.store.read(lambda records: records.identities())

    async def identity(self, agent: AgentId) -> AgentIdentity:
        return await self.store.read(lambda records: known_identity(records, agent))


@contextmanager
def running(folder: Path, *, devices: int, spans: int) -> Iterator[tuple[str, str, str]]:
    """Serve the pages from a thread of its own; yields the address, an operator's secret and a trace's id."""
    ready = threading.Event()
    made: list[tuple[str, str, str]] = []
    stops: list[Any] = []

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            side = await prepare(folder, stack, devices=devices, spans=spans)
            server, loop = HttpServer(Address("127.0.0.1", 0)), asyncio.get_running_loop()
            serving = asyncio.create_task(server.run(side.app))
            made.append((server.url, side.secret, side.trace_id))
            stops.append(lambda: loop.call_soon_threadsafe(server.stop))
            ready.set()
            await serving
            server.close()

    thread = threading.Thread(target=lambda: uvloop.run(serve()), name="controller")
    thread.start()
    try:
        assert ready.wait(START_TIMEOUT_S)
        yield made[0]
    finally:
        stops[0]()
        thread.join(START_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Side:
    app: Guarded
    secret: str
    trace_id: str


async def prepare(folder: Path, stack: AsyncExitStack, *, devices: int, spans: int) -> Side:
    clock = SystemClock()
    database = await opened(folder / "controller.sqlite", stack)
    trace_database = await opened(folder / "traces.sqlite", stack)
    store = SqlRegistryStore(database)
    for number, name in enumerate(MODELS):
        publication = made_publication(str(number), name)
        await store.add_publication(publication)
        await store.record_version(made_version(name, 1, INT8), publication)
    registry = reading_registry(store)
    fleet_store = SqlFleetStore(database)
    agents = [an_agent(number, clock) for number in range(devices)]
    await fleet_store.run(lambda records: records.save_agents(agents))
    fleet = Fleet(fleet_store, registry, releases=OpenCatalogue(), clock=clock, max_sessions=devices)
    traces = Traces(SqlTraceStore(trace_database), max_spans=spans)
    requests = [a_request(number, clock) for number in range(spans // SPANS_PER_REQUEST)]
    for start in range(0, len(requests), 1000):
        batch = [span for request in requests[start : start + 1000] for span in request]
        await SqlTraceStore(trace_database).add(batch, max_spans=spans)
    statistics = Statistics(traces, max_rows=spans)
    stack.push_async_callback(statistics.close)
    access = Access(SqlAccessStore(database), clock=clock)
    secret = (await access.create("bench", OperatorRole.OPERATOR)).secret
    identities = StoredIdentities(SqlIdentityStore(database))
    await identities.store.run(lambda records: save_identities(records, agents, clock))
    sources = Sources(fleet, registry, traces, statistics, identities, NoSigning(), clock)
    dashboard = Dashboard(sources, access, version="bench")
    audit = await audit_over(database, clock)
    trust = TrustFaces(access, audit, cast("Any", None), cast("Any", None), cast("Any", None))
    app = create_operator_app(
        registry=registry,
        fleet=fleet,
        traces=traces,
        records=cast("Any", None),
        pulls=cast("Any", None),
        trust=trust,
        pages=dashboard.router(),
        clock=clock,
        server_version="bench",
    )
    for loop in (fleet.run, statistics.run, dashboard.run, lambda: report_for_ever(fleet, agents)):
        stack.push_async_callback(cancelled, asyncio.create_task(loop()))
    return Side(Guarded(app, access, audit), secret, requests[-1][0].trace_id)


def reading_registry(store: SqlRegistryStore) -> Registry:
    """Return a registry that is only read."""
    nothing = cast("Any", None)
    return Registry(
        store,
        nothing,
        nothing,
        releases=OpenCatalogue(),
        cutter=nothing,
        clock=SystemClock(),
        max_model_bytes=1,
        max_queued_publications=1,
    )


async def opened(path: Path, stack: AsyncExitStack) -> Database:
    database = Database(f"sqlite:///{path}")
    stack.push_async_callback(database.close)
    await database.migrate()
    return database


async def report_for_ever(fleet: Fleet, agents: Sequence[Agent]) -> None:
    """Hold the sessions of four fifths of the fleet; one of them reports all the time."""
    async with AsyncExitStack() as stack:
        sessions = []
        for agent in agents[: len(agents) * 4 // 5]:
            hello = AgentHello(agent.agent_id, agent.site, "0.1.0", agent.boot_id, agent.reported.applied, agent.tags)
            sessions.append((await stack.enter_async_context(fleet.session(hello)))[0])
        while True:
            fleet.reported(sessions[0], agents[0].reported)
            await asyncio.sleep(REPORT_EVERY_S)


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def an_agent(number: int, clock: SystemClock) -> Agent:
    agent_id, position, now = AgentId(f"device-{number:04}"), Position(1, 3), clock.now()
    slots = (made_slot(MODELS[number % 6], 1, INT8), made_slot(MODELS[6 + number % 6], 1, INT8))
    phases = (SlotPhase.READY, SlotPhase.FAILED if number % 50 == 0 else SlotPhase.READY)
    problem = Problem("disk_full", "no room for 2,000,000 bytes; free some, or deploy a smaller variant")
    transfer = Transfer(20_000, 1_000_000, 500_000, 3, 1, 1, 9)
    reports = tuple(
        SlotReport(slot, phase, 1_000_000, 1_000_000, problem if phase is SlotPhase.FAILED else None, transfer)
        for slot, phase in zip(slots, phases, strict=True)
    )
    return Agent(
        agent_id,
        SiteId(f"site-{number % SITES}"),
        "0.1.0",
        f"boot-{number}",
        ("arch:x86_64", "memory:8gb"),
        now - timedelta(days=30),
        now - timedelta(minutes=number % 90),
        DesiredState(agent_id, position, now, slots),
        ReportedState(position if number % 20 else NOWHERE, reports),
    )


def save_identities(records: IdentityRecords, agents: Sequence[Agent], clock: SystemClock) -> None:
    for agent in agents:
        records.save_identity(an_identity(agent, clock))


def an_identity(agent: Agent, clock: SystemClock) -> AgentIdentity:
    now = clock.now()
    key = PublicKey(agent.agent_id.encode())
    return AgentIdentity(agent.agent_id, agent.site, key, None, "1", now + timedelta(days=5), now, now, "token")


def a_request(number: int, clock: SystemClock) -> list[SpanRecord]:
    """Return the spans of one escalated request within the last hour."""
    chance = random.Random(number)
    start_us = int(clock.now().timestamp() * 1e6) - chance.randrange(3_600_000_000)
    model, site = MODELS[number % len(MODELS)], f"site-{number % SITES}"
    offload_us = round(chance.lognormvariate(9.2, 0.5))
    rows = (
        ("nanofleet-device", f"ask {model}", 0, offload_us + 1500),
        ("nanofleet-agent", f"process {model}", 400, offload_us + 600),
        ("nanofleet-agent", "queue", 420, 90),
        ("nanofleet-agent", "compute", 510, 80),
        ("nanofleet-agent", "offload", 600, offload_us),
        ("nanofleet-controller", "infer large", 900, offload_us - 400),
        ("nanofleet-heavy", "infer large", 1200, max(1, offload_us - 900)),
    )
    trace_id = f"{number + 1:032x}"
    return [
        SpanRecord(
            trace_id,
            f"{number * SPANS_PER_REQUEST + k + 1:016x}",
            None if k == 0 else f"{number * SPANS_PER_REQUEST + (1 if k == 1 else 2):016x}",
            name,
            SpanKind.INTERNAL,
            service,
            f"device-{number % 2000:04}",
            start_us + offset_us,
            max(1, duration_us),
            number % 97 == 0,
            {"nanofleet.site": site, "nanofleet.escalated": True, "nanofleet.confidence": 0.4}
            if service in {"nanofleet-device", "nanofleet-agent"}
            else {"nanofleet.tier": "heavy"},
        )
        for k, (service, name, offset_us, duration_us) in enumerate(rows)
    ]


if __name__ == "__main__":
    main()
