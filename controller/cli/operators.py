"""`nanofleet operators`: who may ask the controller, and with which role."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controller.api import access_views as views
from controller.cli import completion
from controller.cli.client import ControllerClient
from controller.cli.credential import Credential, write_credential
from controller.cli.examples import examples
from controller.cli.options import client_of, usage_errors
from controller.cli.screen import Output, OutputOption, RemovedView, show
from controller.cli.watching import WatchOption, present
from core.errors import Conflict, InvalidRequest

app = typer.Typer(help="Manage who may operate the controller.", no_args_is_help=True)

NewNameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The operator's name.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The operator's name.", autocompletion=completion.operator_names)
]
SaveOption = Annotated[
    Path | None, typer.Option("--save", metavar="FILE", help="Write a credential file for them instead of showing it.")
]


@app.command("list", epilog=examples("nanofleet operators list"))
def list_operators(context: typer.Context, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """List the operators."""
    present(context, lambda client, _seen: client.operators(), _operators, output=output, is_watched=watch)


def _operators(found: views.OperatorsView) -> Table:
    table = Table("name", "role", "since")
    for operator in found.operators:
        table.add_row(operator.name, operator.role, f"{operator.created_at.astimezone():%Y-%m-%d %H:%M}")
    return table


@app.command(
    "add",
    epilog=examples(
        "nanofleet operators add shop --role viewer",
        "nanofleet operators add ada --role admin --save ada.json",
    ),
)
def add_operator(
    context: typer.Context,
    name: NewNameArgument,
    role: Annotated[views.RoleText, typer.Option(help="What they may do; each role may also do what those before it.")],
    save: SaveOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Add an operator; the secret is shown once."""
    with usage_errors():
        body = views.OperatorBody(name=name, role=role)
    if save is not None and save.exists():
        raise Conflict(f"{save}: exists already; name another file")
    with client_of(context) as client:
        _hand_out(client, client.add_operator(body), save, output=output)


@app.command("rotate", epilog=examples("nanofleet operators rotate shop"))
def rotate_operator(
    context: typer.Context, name: NameArgument, save: SaveOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Give an operator another secret; the old one and all browser sessions end at once."""
    with client_of(context) as client:
        own = client.credential_file
        # Our own secret is replaced where we read it, or the next command would be refused.
        if save is None and own is not None and own.credential is not None and own.credential.name == name:
            save = own.path
        _hand_out(client, client.rotate_operator(name), save, output=output)


@app.command("remove", epilog=examples("nanofleet operators remove shop"))
def remove_operator(context: typer.Context, name: NameArgument, output: OutputOption = Output.TABLE) -> None:
    """Remove an operator; its secret and browser sessions end at once. The last admin stays."""
    with client_of(context) as client:
        client.remove_operator(name)
    show(RemovedView(removed=name), f"operator {name} is removed", output=output)


def _hand_out(client: ControllerClient, issued: views.IssuedSecretView, save: Path | None, *, output: Output) -> None:
    operator = issued.operator
    shown = f"secret of {operator.name} ({operator.role}), shown only now: {issued.secret}"
    if save is None:
        show(issued, shown, output=output)
        return
    try:
        write_credential(save, _credential(client, issued))
    except InvalidRequest:
        # The old secret has ended and nobody can tell the new one again.
        show(issued, shown, output=output)
        raise
    show(issued, f"credential of {operator.name} ({operator.role}) is in {save}", output=output)


def _credential(client: ControllerClient, issued: views.IssuedSecretView) -> Credential:
    """Return a credential for the controller that we talk to, believing what we believe."""
    own = client.credential_file
    server_name = None if own is None or own.credential is None else own.credential.server_name
    return Credential(
        controller=client.url,
        name=issued.operator.name,
        secret=issued.secret,
        trust_bundle=None if own is None else own.trust_bundle(),
        server_name=server_name,
    )
