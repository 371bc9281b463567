"""`nanofleet-agent status`: what the running agent last wrote about itself, as text or JSON."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from core.errors import NanofleetError
from edge_agent.health.state_folder import StateFolder
from edge_agent.health.status_file import (
    AgentStatus,
    CertificateView,
    EnergyView,
    MemoryView,
    ModelView,
    OutboxView,
    PeerView,
    ResidencyView,
    read_status,
)

_MIB = 1 << 20
# More than any machine has.
_NO_BUDGET_BYTES = 1 << 60
# The agent looks once a second whether there is something to write.
_WATCH_INTERVAL_S = 1.0
# Home, and clear what is below (ECMA-48: CUP, ED).
_CLEAR = "\x1b[H\x1b[J"


class ExitCode(IntEnum):
    """As of the LSB's init scripts: 0 runs, 3 does not."""

    RUNNING = 0
    NO_STATUS = 1
    NOT_RUNNING = 3


def show_status(folder: StateFolder, *, as_json: bool) -> ExitCode:
    """Print the status of the agent on `folder`, and say by the exit code whether it runs."""
    is_running, now = folder.is_held(), datetime.now(UTC)
    try:
        status = read_status(folder.status)
    except NanofleetError as error:
        sys.stderr.write(f"nanofleet-agent: {error}\n")
        return ExitCode.NO_STATUS
    text = json.dumps(_document(status, is_running=is_running, now=now), indent=2) if as_json else ""
    sys.stdout.write((text or "\n".join(render(status, is_running=is_running, now=now))) + "\n")
    return ExitCode.RUNNING if is_running else ExitCode.NOT_RUNNING


def watch_status(folder: StateFolder, *, as_json: bool) -> int:
    """Show the status again whenever the file says another thing, until Ctrl-C.

    On a terminal it is drawn over the last one; JSON is one document per line.
    """
    seen: tuple[bool, datetime] | None = None
    try:
        while True:
            status, is_running = read_status(folder.status), folder.is_held()
            if (is_running, status.written_at) != seen:
                seen = is_running, status.written_at
                sys.stdout.write(_frame(status, is_running=is_running, as_json=as_json))
                sys.stdout.flush()
            time.sleep(_WATCH_INTERVAL_S)
    except KeyboardInterrupt:
        return 0


def _frame(status: AgentStatus, *, is_running: bool, as_json: bool) -> str:
    now = datetime.now(UTC)
    if as_json:
        return json.dumps(_document(status, is_running=is_running, now=now)) + "\n"
    text = "\n".join(render(status, is_running=is_running, now=now)) + "\n"
    return f"{_CLEAR}{text}" if sys.stdout.isatty() else f"{text}\n"


def render(status: AgentStatus, *, is_running: bool, now: datetime) -> list[str]:
    agent = status.agent
    life = f"running as process {agent.pid} for {_span(agent.started_at, now)}" if is_running else "NOT RUNNING"
    lines = [
        f"agent       {agent.agent_id} at {agent.site}, version {agent.software_version}",
        f"process     {life}; status written {_span(status.written_at, now)} ago",
        f"controller  {_peer(status.controller, is_running=is_running, now=now)}",
        f"broker      {_peer(status.broker, is_running=is_running, now=now)}",
        f"certificate {_certificate(status.certificate, now=now)}",
        *([f"clock       {status.clock_problem}"] if status.clock_problem else []),
        f"heavy tier  breaker {status.heavy_breaker}" + ("" if status.outbox.is_heavy_reachable else ", out of reach"),
        *_outbox(status.outbox),
        *([f"memory      {_memory(status.memory)}"] if status.memory is not None else []),
        *([f"energy      {_energy(status.energy)}"] if status.energy is not None else []),
        f"desired     epoch {status.epoch}, generation {status.generation} applied",
        "",
        *_table(
            ("MODEL", "VERSION", "VARIANT", "PHASE", "STORED", "MEMORY", "PROBLEM"),
            [_row(model, status.memory) for model in status.models],
        ),
    ]
    counted = [(name, str(count)) for name, count in sorted(status.counters.items())]
    return [*lines, "", *_table(("COUNTER", "VALUE"), counted)]


def _document(status: AgentStatus, *, is_running: bool, now: datetime) -> dict[str, Any]:
    document = status.model_dump(mode="json")
    return {"is_running": is_running, "age_s": round((now - status.written_at).total_seconds(), 3), **document}


def _peer(peer: PeerView | None, *, is_running: bool, now: datetime) -> str:
    if peer is None:
        return "switched off"
    connection = "connected" if peer.is_connected else f"away ({peer.state})"
    text = f"{peer.address} {connection} for {_span(peer.since, now)}"
    if peer.is_connected:
        return text
    if peer.last_error:
        text += f"; {peer.last_error}"
    if not is_running:
        return text
    return f"{text}; trying again" + (f" in {_span(now, peer.retry_at)}" if peer.retry_at is not None else "")


def _outbox(outbox: OutboxView) -> list[str]:
    """Return what waits, and what was lost; nothing when there is nothing to tell."""
    lines = [f"outbox      in memory only, the disk is {outbox.trouble}"] if outbox.trouble else []
    told = {kind: each for kind, each in outbox.kinds.items() if each.rows or each.lost}
    return [*lines, *(f"outbox      {kind}: {each.text}" for kind, each in told.items())]


def _certificate(certificate: CertificateView, *, now: datetime) -> str:
    text = f"good for {_span(now, certificate.not_after)}" if now < certificate.not_after else "expired"
    return "; ".join(part for part in (text, certificate.last_error, certificate.clock_problem) if part)


def _energy(energy: EnergyView) -> str:
    recent = (
        f"{energy.recent_joules / energy.recent_answers:.3g} J an answer" if energy.recent_answers else "no answers"
    )
    total = f"{energy.joules:.4g} J for {energy.answers} answers since it began"
    return f"{energy.method}: {energy.watts:.3g} W and {recent} over the last minute; {total}"


def _memory(memory: MemoryView) -> str:
    budget = "no limit" if memory.budget_bytes >= _NO_BUDGET_BYTES else f"{memory.budget_bytes / _MIB:.1f} MiB"
    resident = sum(model.state == "resident" for model in memory.models.values())
    return f"models take {memory.taken_bytes / _MIB:.1f} MiB of {budget}; {resident} of {len(memory.models)} resident"


def _row(model: ModelView, memory: MemoryView | None) -> tuple[str, ...]:
    stored = f"{model.stored_bytes / _MIB:.1f}/{model.total_bytes / _MIB:.1f} MiB"
    residency = None if memory is None else memory.models.get(model.model)
    place, problem = ("-", model.problem) if residency is None else (_place(residency), model.problem)
    if residency is not None and residency.state == "cold" and not problem:
        problem = residency.reason
    return model.model, str(model.version), model.variant, model.phase, stored, place, problem


def _place(residency: ResidencyView) -> str:
    if not residency.taken_bytes:
        return residency.state
    return f"{residency.state} {residency.taken_bytes / _MIB:.1f} MiB"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _span(start: datetime, end: datetime) -> str:
    seconds = max(0.0, (end - start).total_seconds())
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
