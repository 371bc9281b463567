"""`nanofleet devices`: the agents, what they shall run, what they run, and what keeps them from it."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from controller.api import operator_views as views
from controller.cli import completion
from controller.cli.client import LONG_POLL_S, ControllerClient
from controller.cli.examples import examples
from controller.cli.options import client_of, usage_errors
from controller.cli.screen import Output, OutputOption, age_text, bytes_text, peer_text, show
from controller.cli.watching import WatchOption, present

app = typer.Typer(help="Look at the edge agents.", no_args_is_help=True)

PHASE_STYLE = {
    "fetching": "cyan",
    "waiting": "yellow",
    "self_test": "cyan",
    "loading": "cyan",
    "probation": "green",
    "ready": "green",
    "failed": "red",
}


AgentArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The agent's name.", autocompletion=completion.device_names)
]


@app.command(
    "list",
    epilog=examples(
        "nanofleet devices list",
        "nanofleet devices list --watch",
        "nanofleet devices list --watch --output json",
    ),
)
def list_devices(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """List the agents."""
    present(context, _next_agents, _devices, output=output, is_watched=watch, interval_s=0)


@app.command("show", epilog=examples("nanofleet devices show gate-1", "nanofleet devices show gate-1 --watch"))
def show_device(
    context: typer.Context, agent: AgentArgument, output: OutputOption = Output.TABLE, watch: WatchOption = False
) -> None:
    """Show one agent: what it shall run, what it runs, what failed and what to do."""

    def look(client: ControllerClient, _seen: views.AgentView | None) -> views.AgentView:
        return client.agent(agent)

    present(context, look, _device, output=output, is_watched=watch)


def _next_agents(client: ControllerClient, seen: views.AgentsView | None) -> views.AgentsView:
    return client.agents() if seen is None else client.agents_after(seen.revision, wait_s=LONG_POLL_S)


def _device(agent: views.AgentView) -> Group:
    return Group(_facts(agent), _slots(agent), *_problems(agent))


def _devices(found: views.AgentsView) -> Table:
    now = datetime.now(UTC)
    table = Table("agent", "site", "state", "models", "seen", "version")
    for agent in found.agents:
        table.add_row(
            agent.id, agent.site, _state(agent), _models(agent), _seen(agent, now), peer_text(agent.software_version)
        )
    return table


@app.command("allow-transfer", epilog=examples("nanofleet devices allow-transfer gate-1 digits-nano"))
def allow_transfer(
    context: typer.Context,
    agent: Annotated[str, typer.Argument(help="An agent on a metered link.", autocompletion=completion.device_names)],
    model: Annotated[str, typer.Argument(help="The model that it waits for.", autocompletion=completion.model_names)],
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a metered agent fetch what it cannot get as a difference. It costs what `devices show` says."""
    with usage_errors():
        body = views.TransferBody(model=model)
    with client_of(context) as client:
        slot = client.permit_transfer(agent, body)
    show(slot, f"{agent} may fetch {slot_name(slot)} in full", output=output)


def _state(agent: views.AgentView) -> Text:
    if not agent.is_online:
        return Text("offline", style="yellow")
    if agent.rejection is not None or any(slot.phase == "failed" for slot in agent.slots):
        return Text("online, failing", style="red")
    return Text("online", style="green") if agent.is_in_sync else Text("online, changing", style="cyan")


def _models(agent: views.AgentView) -> Text:
    text = Text()
    for kth, report in enumerate(agent.slots):
        text.append("" if kth == 0 else "\n")
        text.append(f"{slot_name(report.slot)} ")
        text.append(phase_text(report), style=PHASE_STYLE[report.phase])
    return text


def _seen(agent: views.AgentView, now: datetime) -> str:
    return "now" if agent.is_online else age_text(agent.last_seen_at, now=now)


def slot_name(slot: views.SlotView) -> str:
    return f"{slot.model}:{slot.version} {slot.variant}"


def phase_text(report: views.SlotReportView) -> str:
    if report.phase == "fetching" and report.total_bytes:
        rate = report.transfer.rate_bytes_per_s if report.transfer is not None else 0
        speed = f" at {bytes_text(rate)}/s" if rate else ""
        return f"fetching {report.stored_bytes / report.total_bytes:.0%}{speed}"
    return report.phase.replace("_", "-")


def _facts(agent: views.AgentView) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("agent", Text(agent.id, style="bold"))
    table.add_row("site", agent.site)
    table.add_row("state", _state(agent))
    table.add_row("software", peer_text(agent.software_version))
    table.add_row("tags", peer_text(", ".join(agent.tags)))
    table.add_row("first seen", f"{agent.first_seen_at.astimezone():%Y-%m-%d %H:%M:%S}")
    table.add_row("last seen", _seen(agent, datetime.now(UTC)))
    table.add_row("desired", _position(agent.desired))
    table.add_row("applied", _position(agent.applied))
    if agent.usage is not None:
        table.add_row("requests", _usage(agent.usage))
    if agent.health is not None:
        table.add_row("machine", _health(agent.health))
    if agent.energy is not None:
        table.add_row("energy", _energy(agent.energy))
    return table


def _usage(usage: views.UsageView) -> str:
    counts = f"{usage.answered_edge} at the edge, {usage.answered_heavy} by the heavy tier, {usage.refused} refused"
    escalated = "" if usage.escalated_ratio is None else f", {usage.escalated_ratio:.0%} escalated"
    since = f"{usage.since.astimezone():%Y-%m-%d %H:%M:%S}"
    return f"{counts}, {usage.failed} failed since {since}; {usage.requests_per_s:.1f}/s{escalated}"


def _health(health: views.AgentHealthView) -> str:
    warmth = "" if health.temperature_c is None else f", {health.temperature_c:.0f} °C"
    memory = f"{bytes_text(health.rss_bytes)} taken, {bytes_text(health.available_bytes)} left"
    return f"{memory}, load {health.load:.2f}{warmth}; {age_text(health.reported_at, now=datetime.now(UTC))}"


def _energy(energy: views.EnergyView) -> str:
    recent, total = _joules(energy.recent_joules_per_answer), _joules(energy.joules_per_answer)
    return f"{energy.method}: {energy.watts:.3g} W, {recent} over the last minute; {total} since it began"


def _joules(each: float | None) -> str:
    return "no answers" if each is None else f"{each:.3g} J an answer"


def _position(position: views.PositionView) -> str:
    return f"epoch {position.epoch}, generation {position.generation}"


def _slots(agent: views.AgentView) -> Table:
    """Return one row per model: what is asked for, what is there, how far it is."""
    reports = {report.slot.model: report for report in agent.slots}
    desired = {slot.model: slot for slot in agent.desired_slots}
    table = Table("model", "desired", "reported", "phase", "stored", "received", "saved", "chunks")
    for model in sorted(desired.keys() | reports.keys()):
        slot, report = desired.get(model), reports.get(model)
        table.add_row(
            model,
            "nothing" if slot is None else f"{slot.version} {slot.variant}",
            "nothing" if report is None else f"{report.slot.version} {report.slot.variant}",
            Text("-") if report is None else Text(phase_text(report), style=PHASE_STYLE[report.phase]),
            "-" if report is None else f"{bytes_text(report.stored_bytes)} of {bytes_text(report.total_bytes)}",
            *_transfer(None if report is None else report.transfer),
        )
    return table


def _transfer(transfer: views.TransferView | None) -> tuple[str, str, str]:
    """Return bytes received, bytes saved by what was there already, and how the chunks came."""
    if transfer is None:
        return "-", "-", "-"
    saved_ratio = transfer.saved_bytes / transfer.brought_bytes if transfer.brought_bytes else 0.0
    chunks = {
        "same": transfer.same_chunks,
        "difference": transfer.difference_chunks,
        "zstd": transfer.zstd_chunks,
        "raw": transfer.raw_chunks,
    }
    return (
        bytes_text(transfer.wire_bytes),
        f"{bytes_text(transfer.saved_bytes)} ({saved_ratio:.0%})",
        ", ".join(f"{count} {name}" for name, count in chunks.items() if count) or "-",
    )


def _problems(agent: views.AgentView) -> list[Text]:
    lines = [
        peer_text(f"{slot_name(report.slot)}: {report.problem.message}", style="red")
        for report in agent.slots
        if report.problem is not None
    ]
    if agent.rejection is not None:
        lines.append(peer_text(f"refused what it was asked last: {agent.rejection.message}", style="red"))
    return lines
