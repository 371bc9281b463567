"""`nanofleet traces`: the recent ones, and one as a waterfall."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from controller.api import operator_views as views
from controller.cli import completion
from controller.cli.client import ControllerClient
from controller.cli.examples import examples
from controller.cli.screen import Output, OutputOption, milliseconds_text, peer_text
from controller.cli.watching import WatchOption, present
from controller.cli.waterfall import draw, tier_text

app = typer.Typer(help="Look at where the time of requests went.", no_args_is_help=True)


@app.command(
    "list",
    epilog=examples("nanofleet traces list --model digits-nano", "nanofleet traces list --limit 5 --watch"),
)
def list_traces(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    service: Annotated[str | None, typer.Option(help="Only with a span of this service.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Only with a span about this model.", autocompletion=completion.model_names),
    ] = None,
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """List the recent traces, the newest first."""

    def look(client: ControllerClient, _seen: views.TracesView | None) -> views.TracesView:
        return client.traces(limit=limit, service=service, model=model)

    present(context, look, _table, output=output, is_watched=watch)


@app.command("show", epilog=examples("nanofleet traces show 0af7651916cd43dd8448eb211c80319c"))
def show_trace(
    context: typer.Context,
    trace: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="The trace's id, as `traces list` shows it.", autocompletion=completion.trace_ids
        ),
    ],
    output: OutputOption = Output.TABLE,
    watch: WatchOption = False,
) -> None:
    """Draw one trace as a waterfall over tiers and stages; spans of a slow tier may come later than the others."""

    def look(client: ControllerClient, _seen: views.TraceView | None) -> views.TraceView:
        return client.trace(trace)

    present(context, look, draw, output=output, is_watched=watch)


def _table(found: views.TracesView) -> Table:
    table = Table()
    table.add_column("trace", no_wrap=True)
    for heading in ("started", "what", "tiers"):
        table.add_column(heading)
    for heading in ("spans", "duration"):
        table.add_column(heading, justify="right")
    for trace in found.traces:
        started = datetime.fromtimestamp(trace.start_us / 1e6, UTC).astimezone()
        table.add_row(
            trace.trace_id,
            f"{started:%H:%M:%S}",
            peer_text(trace.root_name, style="red" if trace.has_error else ""),
            Text(" ").join(map(tier_text, trace.services)),
            str(trace.span_count),
            milliseconds_text(trace.duration_us),
        )
    return table
