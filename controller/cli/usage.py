"""`nanofleet usage` and `nanofleet devices events`: what agents wrote down, also while they were alone."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table

from controller.api import records_views as views
from controller.cli import completion
from controller.cli.devices import AgentArgument
from controller.cli.screen import Output, OutputOption, peer_text
from controller.cli.watching import WatchOption, present

_DAY = "%Y-%m-%d"


class Per(StrEnum):
    MODEL = "model"
    AGENT = "agent"
    BOTH = "both"
    FLEET = "fleet"


def usage(
    context: typer.Context,
    since: Annotated[
        datetime | None, typer.Option(formats=[_DAY], help="First day, in UTC; without it thirty days back.")
    ] = None,
    until: Annotated[datetime | None, typer.Option(formats=[_DAY], help="Last day; without it today.")] = None,
    per: Annotated[Per, typer.Option(help="What the numbers of a day are told apart by.")] = Per.MODEL,
    agent: Annotated[str | None, typer.Option(help="Only this agent.", autocompletion=completion.device_names)] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.", autocompletion=completion.model_names)] = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """Sum up by day what became of requests to agents. What an agent has not sent yet is missing."""
    chosen = {
        "since": None if since is None else since.strftime(_DAY),
        "until": None if until is None else until.strftime(_DAY),
        "agent": agent,
        "model": model,
    }
    wanted = {"per": per.value, **{key: value for key, value in chosen.items() if value is not None}}
    present(context, lambda client, _seen: client.usage(wanted), _days, output=output, is_watched=watch)


def events(
    context: typer.Context,
    agent: AgentArgument,
    limit: Annotated[int, typer.Option(min=1, max=500, help="How many, the newest first.")] = 50,
    before: Annotated[int | None, typer.Option(min=1, help="Only events older than this one.")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this action, such as clock.jumped; `outbox.` stands for all of those.")
    ] = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """List what happened to an agent, as it told: models that came and failed, losses, disk and clock."""
    chosen = {"before": before, "action": action}
    wanted = {"limit": limit, **{key: value for key, value in chosen.items() if value is not None}}
    present(context, lambda client, _seen: client.events(agent, wanted), _events, output=output, is_watched=watch)


def _days(found: views.UsageReportView) -> Table:
    table = Table("day", "agent", "model", "edge", "heavy", "refused", "failed")
    for each in found.days:
        model = "all" if each.model is None else each.model or "unknown models"
        counts = (each.answered_edge, each.answered_heavy, each.refused, each.failed)
        table.add_row(
            str(each.day), peer_text(each.agent or "all"), peer_text(model), *(f"{count}" for count in counts)
        )
    return table


def _events(found: views.AgentEventsView) -> Table:
    table = Table("id", "when", "action", "target", "times", "detail")
    for event in found.events:
        table.add_row(
            str(event.id),
            f"{event.at.astimezone():%Y-%m-%d %H:%M:%S}",
            peer_text(event.action),
            peer_text(event.target),
            str(event.count),
            peer_text(event.detail),
        )
    return table
