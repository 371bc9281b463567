"""This agent's post office: what waits in the outbox, who empties it, and what is put there by itself.

    requests ─UsageLedger─┐
    models, disk, clock ─Events─┤
    spans ─SpanKeeper─────┼─▶ Outbox ─Courier per kind─▶ RecordService, OTLP, heavy tier
    deferrable escalations┘                  ▲
                                  Reachability (probes)

Made by the composition root before the data plane, which takes `deferrals` and `is_reachable` from here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from core.backoff import BackoffPolicy
from core.clock import Clock
from core.telemetry import Tracing
from edge_agent.cascade.deferral import VerdictSink
from edge_agent.cascade.offload import Offload
from edge_agent.health.status_file import OutboxView, WaitingView
from edge_agent.link.reachability import Gate, ProbePolicy, Reachability, ServerReadyProbe
from edge_agent.outbox.ageing import this_boot
from edge_agent.outbox.courier import Courier, Pace, Receiver
from edge_agent.outbox.deferrals import DeferredReceiver, OutboxDeferrals
from edge_agent.outbox.events import Events, WatchedReport
from edge_agent.outbox.ledger import UsageLedger
from edge_agent.outbox.outbox import Outbox
from edge_agent.outbox.records import RecordReceiver
from edge_agent.outbox.rows import Bounds, Kind
from edge_agent.outbox.storage import Figures, Storage, StorageLimits
from edge_agent.outbox.telemetry import SpanKeeper, SpanReceiver
from edge_agent.request_metrics import RequestMetrics
from edge_agent.settings import AgentSettings, OutboxKindSettings, OutboxSettings

# Chosen: a message of some hundred kilobytes takes seconds over a slow link, and is sent again whole when it breaks.
_BATCH_ROWS, _BATCH_BYTES = 100, 256 << 10

Loop = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Correspondents:
    """Whom this agent writes to."""

    channel: grpc.aio.Channel
    offload: Offload
    is_link_open: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Sources:
    """What is written down by itself, of the process that `boot_id` names."""

    counted: RequestMetrics
    tracing: Tracing
    boot_id: str


class PostOffice:
    def __init__(
        self,
        path: Path,
        settings: AgentSettings,
        correspondents: Correspondents,
        sources: Sources,
        *,
        clock: Clock,
    ) -> None:
        self._settings = own = settings.outbox
        self._spans = settings.telemetry.endpoint
        self._to = correspondents
        self._clock = clock
        bounds = _bounds(own)
        limits = StorageLimits(bounds, own.max_bytes, own.min_free_bytes)
        self._outbox = Outbox(Storage(path, limits, clock=clock, boot=this_boot()), bounds, clock=clock)
        self._events = Events(self._outbox, sources.counted.private, boot_id=sources.boot_id, clock=clock)
        self._outbox.on_incident(self._events.note)
        counts = sources.counted.usage_by_model
        self._ledger = UsageLedger(counts, self._outbox, boot_id=sources.boot_id, clock=clock)
        sources.tracing.keep_undelivered(SpanKeeper(self._outbox))
        self.deferrals = OutboxDeferrals(self._outbox)
        self.reachability = Reachability(
            ServerReadyProbe(correspondents.channel),
            is_link_open=correspondents.is_link_open,
            breaker_openings=lambda: correspondents.offload.breaker_openings,
            clock=clock,
            policy=ProbePolicy(own.probe_first_s, own.probe_cap_s),
        )

    async def open(self) -> None:
        await self._outbox.open()

    async def close(self) -> None:
        """Write down what happened until now; after the last span was exported, or failed to be."""
        self._ledger.flush()
        self._events.tell_sums()
        await self._outbox.close()

    @property
    def figures(self) -> Figures | None:
        return self._outbox.figures

    @property
    def sent(self) -> Mapping[Kind, int]:
        return self._outbox.sent

    @property
    def clock_jumps(self) -> int:
        return self._outbox.clock_jumps

    def view(self) -> OutboxView:
        """Return how it stands, for the status file."""
        figures, is_reachable = self._outbox.figures, self.reachability.is_reachable()
        if figures is None:
            return OutboxView(is_heavy_reachable=is_reachable)
        return OutboxView(
            trouble="" if figures.trouble is None else figures.trouble.value,
            is_heavy_reachable=is_reachable,
            clock_jumps=self._outbox.clock_jumps,
            kinds={kind.value: self._waiting(kind, figures) for kind in Kind},
        )

    def _waiting(self, kind: Kind, figures: Figures) -> WaitingView:
        tally = figures.tallies[kind]
        return WaitingView(
            rows=tally.rows,
            size_bytes=tally.size_bytes,
            oldest_age_s=None if tally.oldest_s is None else round(max(0.0, figures.now_s - tally.oldest_s), 1),
            sent=self._outbox.sent[kind],
            lost={why.value: rows for (of, why), rows in figures.losses.items() if of is kind},
        )

    # ---- loops, by name ----------------------------------------------------------------------------------------

    @property
    def keeping(self) -> Mapping[str, Loop]:
        """What puts rows and keeps them; needs no network."""
        return {
            "outbox": self._outbox.run,
            "outbox-care": self._outbox.look_after,
            "usage": self._ledger.run,
            "events": self._events.sum_up,
        }

    def outward(self, board: WatchedReport, sink: VerdictSink | None) -> Mapping[str, Loop]:
        """What needs the network; `sink` None: no face here sends verdicts that come late."""
        records = RecordReceiver(self._to.channel, age_s=self._outbox.age_s)
        controller, heavy = self.reachability.controller, self.reachability.heavy
        couriers = {
            Kind.AUDIT: self._courier(Kind.AUDIT, records, controller, rows=_BATCH_ROWS),
            Kind.USAGE: self._courier(Kind.USAGE, records, controller, rows=_BATCH_ROWS),
        }
        if sink is not None:
            deferred = DeferredReceiver(self._to.offload, sink, clock=self._clock)
            couriers[Kind.ESCALATION] = self._courier(Kind.ESCALATION, deferred, heavy, rows=1)
        loops: dict[str, Loop] = {f"outbox-{kind.value}": courier.run for kind, courier in couriers.items()}
        return {
            "reachability": self.reachability.run,
            "model-events": lambda: self._events.follow(board),
            "outbox-telemetry": self._send_spans,
            **loops,
        }

    async def _send_spans(self) -> None:
        if self._spans is None:
            receiver = SpanReceiver(self._to.channel)
            await self._courier(Kind.TELEMETRY, receiver, self.reachability.controller, rows=1).run()
            return
        # Another collector is asked in the clear, as the exporter does; whether it is there shows by asking.
        always = asyncio.Event()
        always.set()
        async with grpc.aio.insecure_channel(self._spans) as channel:
            await self._courier(Kind.TELEMETRY, SpanReceiver(channel), Gate(always), rows=1).run()

    def _courier(self, kind: Kind, receiver: Receiver, gate: Gate, *, rows: int) -> Courier:
        settings = self._settings
        pace = Pace(
            rows,
            _BATCH_BYTES,
            settings.spread_s,
            settings.interval_s,
            BackoffPolicy(settings.retry_base_s, settings.retry_cap_s),
        )
        return Courier(kind, self._outbox, receiver, gate, pace=pace, clock=self._clock)


def _bounds(settings: OutboxSettings) -> dict[Kind, Bounds]:
    of: dict[Kind, OutboxKindSettings] = {
        Kind.TELEMETRY: settings.telemetry,
        Kind.ESCALATION: settings.escalation,
        Kind.AUDIT: settings.audit,
        Kind.USAGE: settings.usage,
    }
    return {kind: Bounds(each.max_rows, each.max_bytes, each.max_age_s) for kind, each in of.items()}
