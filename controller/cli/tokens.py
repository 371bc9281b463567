"""`nanofleet tokens`: those that are out and let devices in. `devices token` is the same as `tokens add`."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from controller.api import identity_views as views
from controller.cli import completion, enrolment
from controller.cli.examples import examples
from controller.cli.options import client_of
from controller.cli.screen import Output, OutputOption, RemovedView, show
from controller.cli.watching import WatchOption, present

app = typer.Typer(help="Look after the tokens that let devices in.", no_args_is_help=True)
app.command(
    "add", epilog=examples("nanofleet tokens add --site berlin", "nanofleet tokens add --site berlin --uses 20")
)(enrolment.token)


@app.command("list", epilog=examples("nanofleet tokens list"))
def list_tokens(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """List the tokens that are not expired; their secrets are not known any more."""
    present(context, lambda client, _seen: client.tokens(), _tokens, output=output, is_watched=watch)


@app.command("remove", epilog=examples("nanofleet tokens remove 5b0c2f"))
def remove_token(
    context: typer.Context,
    token: Annotated[
        str,
        typer.Argument(metavar="ID", help="As `tokens list` shows it.", autocompletion=completion.token_ids),
    ],
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a token be good for nothing; whom it let in stays."""
    with client_of(context) as client:
        client.remove_token(token)
    show(RemovedView(removed=token), f"token {token} is removed", output=output)


def _tokens(found: views.TokensView) -> Table:
    now = datetime.now(UTC)
    table = Table("token", "site", "agent", "uses left", "made by", "good for")
    for token in found.tokens:
        minutes = max(0, int((token.expires_at - now).total_seconds() // 60))
        table.add_row(
            token.id,
            token.site,
            token.agent or "any",
            str(token.uses_left),
            token.created_by,
            f"{minutes // 60} h {minutes % 60} min",
        )
    return table
