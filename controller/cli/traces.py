"""`nanofleet traces`: the recent ones, and one as a waterfall."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from controller.cli.options import client_of
from controller.cli.screen import Output, OutputOption, milliseconds_text, peer_text, show
from controller.cli.waterfall import draw, tier_text

app = typer.Typer(help="Look at where the time of requests went.", no_args_is_help=True)


@app.command("list")
def list_traces(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 20,
    service: Annotated[str | None, typer.Option(help="Only with a span of this service.")] = None,
    model: Annotated[str | None, typer.Option(help="Only with a span about this model.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the recent traces, the newest first."""
    with client_of(context) as client:
        found = client.traces(limit=limit, service=service, model=model)
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
    show(found, table, output=output)


@app.command("show")
def show_trace(
    context: typer.Context,
    trace: Annotated[str, typer.Argument(metavar="ID", help="The trace's id, as `traces list` shows it.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Draw one trace as a waterfall over tiers and stages."""
    with client_of(context) as client:
        found = client.trace(trace)
    show(found, draw(found), output=output)
