"""The root of the `nanofleet` command: options for all commands, the commands, and how failures end."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from controller.cli import (
    audit,
    deploy,
    deployments,
    devices,
    enrolment,
    models,
    operators,
    processes,
    samples,
    signing,
    status,
    tokens,
    traces,
    usage,
)
from controller.cli.client import ControllerAway
from controller.cli.credential import checked_url
from controller.cli.doctor import doctor
from controller.cli.examples import examples
from controller.cli.options import DEFAULT_CONTROLLER, Options
from controller.cli.screen import complain
from core.errors import InvalidRequest, NanofleetError

EXIT_REFUSED = 1
EXIT_AWAY = 3
# As shells say it of a program that SIGINT ended.
EXIT_INTERRUPTED = 130
_EPILOG = (
    "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no controller reached, 130 interrupted with Ctrl-C; "
    "Ctrl-C ends --watch with 0.\n\n"
) + examples(
    "nanofleet --install-completion",
    "nanofleet devices list --watch",
    "nanofleet deploy digits-nano --variant int8-static --site berlin",
)


class _Commands(TyperGroup):
    """Ends every command that fails on purpose or is interrupted with one line on standard error and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NanofleetError as error:
            complain(str(error))
            raise typer.Exit(EXIT_AWAY if isinstance(error, ControllerAway) else EXIT_REFUSED) from error
        except KeyboardInterrupt as error:
            complain("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    name="nanofleet",
    cls=_Commands,
    help="Small models where the data is, large ones where the power is: publish, deploy, look.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    epilog=_EPILOG,
)
app.command("status", epilog=examples("nanofleet status", "nanofleet status --watch"))(status.status)
app.command("doctor", epilog=examples("nanofleet doctor", "nanofleet doctor --config controller.toml --output json"))(
    doctor
)
app.command("whoami", epilog=examples("nanofleet whoami"))(status.whoami)
app.add_typer(models.app, name="models")
devices.app.command(
    "token",
    epilog=examples(
        "nanofleet devices token --site berlin",
        "nanofleet devices token --site berlin --agent gate-1 --lifetime 30m --output json",
    ),
)(enrolment.token)
devices.app.command("identity", epilog=examples("nanofleet devices identity gate-1"))(enrolment.identity)
devices.app.command("ban", epilog=examples("nanofleet devices ban gate-1 --reason 'stolen from the roof'"))(
    enrolment.ban
)
devices.app.command("unban", epilog=examples("nanofleet devices unban gate-1"))(enrolment.unban)
devices.app.command(
    "events",
    epilog=examples(
        "nanofleet devices events gate-1", "nanofleet devices events gate-1 --action variant. --output json"
    ),
)(usage.events)
app.add_typer(devices.app, name="devices")
app.command(
    "usage",
    epilog=examples("nanofleet usage", "nanofleet usage --per both --since 2026-11-01 --model digits-nano"),
)(usage.usage)
app.add_typer(tokens.app, name="tokens")
app.command(
    "deploy",
    epilog=examples(
        "nanofleet deploy digits-nano --variant int8-static --site berlin",
        "nanofleet deploy digits-nano:3 --variant original --agent gate-1 --no-wait",
    ),
)(deploy.deploy)
app.add_typer(deployments.app, name="deployments")
app.add_typer(samples.app, name="samples")
app.add_typer(traces.app, name="traces")
app.add_typer(signing.app, name="signing")
app.add_typer(enrolment.app, name="authority")
app.add_typer(operators.app, name="operators")
app.add_typer(audit.app, name="audit")
app.add_typer(processes.controller_app, name="controller")
app.command("demo", epilog=examples("nanofleet demo", "nanofleet demo --keep"))(processes.demo)


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
