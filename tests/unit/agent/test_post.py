"""The post office as others see it: in the status file and in `/metrics`; and what a clean stop leaves behind."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from core.exposition import exposed
from core.metrics import Registry
from core.telemetry import Tracing, TracingSettings
from edge_agent.agent_metrics import register_post
from edge_agent.cascade.offload import Offload
from edge_agent.cascade.policy import Reason, Tier
from edge_agent.health.status_file import OutboxView
from edge_agent.post import Correspondents, PostOffice, Sources
from edge_agent.request_metrics import RequestMetrics
from edge_agent.settings import AgentSettings
from tests.support.clocks import HeldClock


@asynccontextmanager
async def office(folder: Path, *, counted: RequestMetrics, clock: HeldClock) -> AsyncIterator[PostOffice]:
    settings = AgentSettings.model_validate({"outbox": {"min_free_bytes": 0}})
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        offload = Offload(channel, settings.offload, clock=clock)
        tracing = Tracing("test", TracingSettings())
        made = PostOffice(
            folder / "outbox.sqlite",
            settings,
            Correspondents(channel, offload, lambda: False),
            Sources(counted, tracing, "boot"),
            clock=clock,
        )
        await made.open()
        try:
            yield made
        finally:
            await made.close()


def answer(counted: RequestMetrics) -> None:
    counted.answered("digits", Tier.EDGE, Reason.PRIVACY, queued_s=0.0, started_s=0.0, finished_s=0.0, traceparent=None)


async def test_a_clean_stop_writes_down_what_was_counted_until_then(tmp_path: Path) -> None:
    clock = HeldClock()
    counted = RequestMetrics(Registry(), clock=clock)
    async with office(tmp_path, counted=counted, clock=clock):
        answer(counted)
    async with office(tmp_path, counted=RequestMetrics(Registry(), clock=clock), clock=clock) as after:
        view = after.view()

    assert {kind: each.rows for kind, each in view.kinds.items()} == {
        "telemetry": 0,
        "escalation": 0,
        # That one request stayed here because it is private.
        "audit": 1,
        "usage": 1,
    }
    assert OutboxView.model_validate_json(view.model_dump_json()) == view


async def test_prometheus_is_told_what_waits_and_how_the_disk_is(tmp_path: Path) -> None:
    clock = HeldClock()
    counted = RequestMetrics(Registry(), clock=clock)
    async with office(tmp_path, counted=counted, clock=clock):
        answer(counted)
    registry = Registry()
    async with office(tmp_path, counted=RequestMetrics(Registry(), clock=clock), clock=clock) as post:
        register_post(registry, post)
        text = (await exposed(registry, accept="text/plain")).body.decode()

    for line in (
        'nanofleet_outbox_rows{kind="usage"} 1',
        'nanofleet_outbox_disk_state{state="ok"} 1',
        'nanofleet_outbox_disk_state{state="full"} 0',
        'nanofleet_outbox_sent_total{kind="usage"} 0',
        "nanofleet_heavy_reachable 1",
        "nanofleet_clock_jumps_total 0",
    ):
        assert line in text
