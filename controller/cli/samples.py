"""`nanofleet samples`: hard examples that agents keep, pulled to retrain a model from."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel
from rich.console import Group
from rich.table import Table

from controller.api import sample_views as views
from controller.cli import completion
from controller.cli.examples import examples
from controller.cli.options import client_of, usage_errors
from controller.cli.screen import Output, OutputOption, RemovedView, bytes_text, peer_text, progress_console, show
from controller.cli.watching import WatchOption, present
from core.errors import InvalidRequest
from core.ids import checked_pull_id

if TYPE_CHECKING:
    from controller.cli.fetching import Fetched

app = typer.Typer(help="Pull hard examples, to retrain models from.", no_args_is_help=True)

_REMEDIES = {
    "metered": "its link costs money; pull with --allow-metered",
    "off": "it keeps no samples; see [samples] in its settings",
    "no_room": "the controller's spool is full; fetch, drop, pull again",
}
PullArgument = Annotated[str, typer.Argument(metavar="PULL", help="The pull's id, as `samples pulls` shows it.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the files and their index; made when missing.")]
WaitOption = Annotated[
    float,
    typer.Option(min=0, help="Most seconds to wait for agents that are connected."),
]


class PulledView(BaseModel):
    """What a pull brought so far."""

    pull: str
    folder: str
    fetched: int
    """Samples that this command wrote."""
    in_folder: int
    size_bytes: int
    damaged: int
    """Samples that were none, and were left out."""
    missing: tuple[views.DeliveryView, ...]
    """Agents that have not delivered, or not all."""


@app.command("list", epilog=examples("nanofleet samples list", "nanofleet samples list --model digits-nano --watch"))
def list_samples(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Only those of this model.", autocompletion=completion.model_names)
    ] = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """Say how many hard examples agents keep, by model, predicted class and reason."""

    def draw(found: views.SampleCountsView) -> Group:
        return _counts(found, model)

    present(context, lambda client, _seen: client.sample_counts(), draw, output=output, is_watched=watch)


@app.command(
    "pull",
    epilog=examples(
        "nanofleet samples pull digits-nano --out hard",
        "nanofleet samples pull digits-nano --site berlin --limit 50 --since 2026-03-01 --out hard",
        "nanofleet samples pull digits-nano --agent gate-1 --agent gate-2 --allow-metered --out hard",
    ),
)
def pull(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", autocompletion=completion.model_names)],
    out: OutOption,
    agent: Annotated[
        list[str] | None,
        typer.Option(help="Ask this agent; may be given again.", autocompletion=completion.device_names),
    ] = None,
    site: Annotated[str | None, typer.Option(help="Ask only agents of this site.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most samples of each agent, the newest.")] = views.DEFAULT_LIMIT,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Only those taken since, UTC.")
    ] = None,
    allow_metered: Annotated[
        bool, typer.Option("--allow-metered", help="Let agents deliver whose link costs money.")
    ] = False,
    wait: WaitOption = 300.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Ask agents for hard examples of a model and fetch what comes; offline agents deliver when they return."""
    with usage_errors():
        body = views.PullBody(
            agents=tuple(agent or ()),
            site=site,
            limit=limit,
            since=None if since is None else since.replace(tzinfo=UTC),
            allow_metered=allow_metered,
        )
    if agent and site is not None:
        raise typer.BadParameter("expected --agent or --site, got both")
    with client_of(context) as client:
        made = client.pull_samples(model, body)
        # For `samples fetch`, when this terminal is gone.
        progress_console().print(f"pull {made.id}", highlight=False)
        # Here, so that other commands start without numpy.
        from controller.cli.fetching import fetch_samples

        fetched = fetch_samples(client, made.id, out, wait_s=wait)
    _show_pulled(fetched, out, output)


@app.command("fetch", epilog=examples("nanofleet samples fetch 0af7651916cd43dd8448eb211c80319c --out hard"))
def fetch(
    context: typer.Context,
    pull_id: PullArgument,
    out: OutOption,
    wait: WaitOption = 0.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Fetch what came for a pull since; what is in the folder already is not fetched again."""
    with client_of(context) as client:
        from controller.cli.fetching import fetch_samples

        fetched = fetch_samples(client, _checked(pull_id), out, wait_s=wait)
    _show_pulled(fetched, out, output)


@app.command("pulls", epilog=examples("nanofleet samples pulls", "nanofleet samples pulls --output json"))
def list_pulls(context: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List the pulls that are not over."""
    with client_of(context) as client:
        found = client.sample_pulls()
    table = Table("pull", "model", "asked by", "until", "agents", "samples", "size")
    for each in found.pulls:
        over = sum(delivery.state in {"delivered", "declined"} for delivery in each.deliveries)
        table.add_row(
            each.id,
            peer_text(each.model),
            peer_text(each.asked_by),
            f"{each.expires_at.astimezone():%Y-%m-%d %H:%M}",
            f"{over} of {len(each.deliveries)}",
            str(sum(delivery.samples for delivery in each.deliveries)),
            bytes_text(sum(delivery.size_bytes for delivery in each.deliveries)),
        )
    show(found, table, output=output)


@app.command("drop", epilog=examples("nanofleet samples drop 0af7651916cd43dd8448eb211c80319c"))
def drop(context: typer.Context, pull_id: PullArgument, output: OutputOption = Output.TABLE) -> None:
    """End a pull, and remove from the controller what came for it; agents keep their samples."""
    with client_of(context) as client:
        client.drop_sample_pull(_checked(pull_id))
    show(RemovedView(removed=pull_id), f"pull {pull_id} is over", output=output)


def _checked(pull_id: str) -> str:
    try:
        return checked_pull_id(pull_id)
    except InvalidRequest as error:
        raise typer.BadParameter(str(error)) from error


def _show_pulled(fetched: "Fetched", out: Path, output: Output) -> None:
    missing = tuple(each for each in fetched.pull.deliveries if each.state != "delivered" or each.reason)
    view = PulledView(
        pull=fetched.pull.id,
        folder=str(out),
        fetched=fetched.written,
        in_folder=fetched.in_folder,
        size_bytes=fetched.size_bytes,
        damaged=fetched.damaged,
        missing=missing,
    )
    lines = [f"{view.fetched} samples fetched, {view.in_folder} are in {view.folder}, {bytes_text(view.size_bytes)}"]
    lines += [f"{view.damaged} were damaged and left out"] * (view.damaged > 0)
    if any(each.state in {"waiting", "delivering"} for each in missing):
        until = f"{fetched.pull.expires_at.astimezone():%Y-%m-%d %H:%M}"
        lines.append(f"agents may deliver until {until}: nanofleet samples fetch {view.pull} --out {view.folder}")
    table = Table("agent", "state", "samples", "why")
    for each in missing:
        why = _REMEDIES.get(each.reason, "" if each.is_online else "offline")
        table.add_row(each.agent, each.state, f"{each.samples} of {each.offered}", why)
    show(view, Group(*lines, *([table] if missing else [])), output=output)


def _counts(found: views.SampleCountsView, model: str | None) -> Group:
    table = Table("agent", "model", "class", "reason")
    table.add_column("samples", justify="right")
    for row in found.counts:
        if model in (None, row.model):
            label = "-" if row.label is None else str(row.label)
            style = "" if row.is_online else "dim"
            table.add_row(
                peer_text(row.agent, style=style), peer_text(row.model), label, peer_text(row.reason), str(row.samples)
            )
    total = sum(row.samples for row in found.counts) + found.other
    return Group(table, f"{total} samples, {bytes_text(found.size_bytes)}, as agents last said")
