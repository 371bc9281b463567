"""The root of the `nanofleet` command: options for all commands, the commands, and how failures end."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from controller.cli import audit, deploy, devices, enrolment, models, operators, processes, signing, traces
from controller.cli.client import ControllerAway
from controller.cli.credential import checked_url
from controller.cli.options import DEFAULT_CONTROLLER, Options
from controller.cli.screen import complain
from core.errors import InvalidRequest, NanofleetError

EXIT_REFUSED = 1
EXIT_AWAY = 3


class _Commands(TyperGroup):
    """Ends every command that fails on purpose with one line on standard error and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NanofleetError as error:
            complain(str(error))
            raise typer.Exit(EXIT_AWAY if isinstance(error, ControllerAway) else EXIT_REFUSED) from error


app = typer.Typer(
    name="nanofleet",
    cls=_Commands,
    help="Small models where the data is, large ones where the power is: publish, deploy, look.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
app.add_typer(models.app, name="models")
devices.app.command("token")(enrolment.token)
devices.app.command("ban")(enrolment.ban)
devices.app.command("unban")(enrolment.unban)
app.add_typer(devices.app, name="devices")
app.command("deploy")(deploy.deploy)
app.add_typer(traces.app, name="traces")
app.add_typer(signing.app, name="signing")
app.add_typer(enrolment.app, name="authority")
app.add_typer(operators.app, name="operators")
app.add_typer(audit.app, name="audit")
app.add_typer(processes.controller_app, name="controller")
app.command("demo")(processes.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanofleet {version('nanofleet')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    controller: Annotated[
        str | None,
        typer.Option(
            envvar="NANOFLEET_CONTROLLER",
            help="Base address of the controller's HTTP port; without it, that of the credential, "
            f"or {DEFAULT_CONTROLLER}.",
        ),
    ] = None,
    credential: Annotated[
        Path | None,
        typer.Option(
            envvar="NANOFLEET_CREDENTIAL",
            help="File that says who you are; without it, nanofleet/credential.json below $XDG_CONFIG_HOME.",
        ),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if controller is not None:
        try:
            checked_url(controller)
        except InvalidRequest as error:
            raise typer.BadParameter(str(error)) from error
    context.obj = Options(controller_url=controller, credential_path=credential)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
