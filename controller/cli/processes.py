"""Commands that do something here instead of asking a controller: `controller init`, `controller run` and `demo`.

What they run is imported when they run, so that every other command starts without it.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from controller.cli import backup, drift, initialise
from controller.cli.examples import examples

GRPC_ENVIRONMENT = {
    # Its fork handlers crash about one child process in a hundred that is started while another thread is in a call
    # (measured: 2 of 150; none of 150 without them). No child of ours uses gRPC's state.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # TLS 1.3 only, for which gRPC has no setting: the one TLS 1.2 suite that is left is for RSA, and our certificates
    # are not (measured: no TLS 1.2 handshake succeeds). TLS 1.3 has suites of its own.
    "GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES256-GCM-SHA384",
}

controller_app = typer.Typer(help="Set up and run a controller on this machine.", no_args_is_help=True)
controller_app.command(
    "init",
    epilog=examples(
        "nanofleet controller init --config controller.toml",
        "nanofleet controller init --config controller.toml --reset-admin admin",
    ),
)(initialise.init)
controller_app.command("backup", epilog=examples("nanofleet controller backup /mnt/backup/monday"))(backup.backup)
controller_app.command("restore", epilog=examples("nanofleet controller restore /mnt/backup/monday --replace"))(
    backup.restore
)
controller_app.command("confirm-restore", epilog=examples("nanofleet controller confirm-restore"))(
    backup.confirm_restore
)
controller_app.command("drift", epilog=examples("nanofleet controller drift"))(drift.show_drift)


@controller_app.command(epilog=examples("nanofleet controller run --config controller.toml"))
def run(
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TOML file; environment variables win over it.")
    ] = None,
) -> None:
    """Run a controller until it is told to stop (SIGINT or SIGTERM)."""
    # gRPC reads these when it is imported.
    os.environ.update(GRPC_ENVIRONMENT)
    from controller.main import main
    from controller.settings import load_settings

    main(load_settings(config))


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running until Ctrl-C.")] = False,
    output: Annotated[Path, typer.Option(help="Where the figures are written.")] = Path("build/demo.json"),
    broker: Annotated[
        Literal["auto", "mosquitto", "embedded"],
        typer.Option(help="The MQTT broker; auto: mosquitto where it is installed, otherwise the embedded one."),
    ] = "auto",
) -> None:
    """Run the whole system once on real handwritten digits."""
    from controller.demo.app import run_demo

    run_demo(keep=keep, output=output, broker=broker)
