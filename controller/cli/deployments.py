"""`nanofleet deployments`: what shall run where. `nanofleet deploy` changes it."""

import typer
from rich.table import Table

from controller.api import operator_views as views
from controller.cli.devices import slot_name
from controller.cli.examples import examples
from controller.cli.screen import Output, OutputOption
from controller.cli.watching import WatchOption, present

app = typer.Typer(help="Look at what shall run where.", no_args_is_help=True)


@app.command("list", epilog=examples("nanofleet deployments list"))
def list_deployments(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """List what was deployed to the fleet, to sites and to single agents; the narrowest counts."""
    present(context, lambda client, _seen: client.deployments(), _deployments, output=output, is_watched=watch)


def _deployments(found: views.DeploymentsView) -> Table:
    table = Table("where", "what", "since")
    for deployment in found.deployments:
        where = "fleet" if deployment.target_kind == "fleet" else f"{deployment.target_kind} {deployment.target}"
        table.add_row(where, slot_name(deployment.slot), f"{deployment.created_at.astimezone():%Y-%m-%d %H:%M}")
    return table
