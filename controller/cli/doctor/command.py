"""The command: which checks are run, how their findings are shown, and with which exit code it ends."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from controller.cli.client import Refused
from controller.cli.options import Options
from controller.cli.screen import Output, OutputOption
from core.doctor import Finding, Verdict, document, is_well, ok, problem, render, run_checks
from core.errors import NanofleetError


def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The TOML file that the controller on this machine runs with."),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Find what is set up wrong here, and say the remedy. Ends with 0 only if there is no problem."""
    findings = findings_of(context.obj, config)
    if output is Output.JSON:
        typer.echo(json.dumps(document(findings), indent=2))
    else:
        is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        typer.echo("\n".join(render(findings, is_coloured=is_coloured)))
    if not is_well(findings):
        count = sum(finding.verdict is Verdict.PROBLEM for finding in findings)
        raise Refused(f"{count} problem{'s' if count > 1 else ''}: do what the remedy says and ask again")


def findings_of(options: Options, config: Path | None) -> list[Finding]:
    from controller.cli.doctor.controller_checks import controller_checks
    from controller.cli.doctor.operator_checks import operator_checks
    from controller.settings import load_settings

    try:
        settings = load_settings(config)
    except NanofleetError as error:
        wrong = problem("settings", str(error), expected="settings that fit", remedy="correct what is named there")
        return [wrong, *run_checks(operator_checks(options))]
    whose = "those of the defaults and the environment" if config is None else str(config)
    return [ok("settings", whose), *run_checks({**operator_checks(options), **controller_checks(settings)})]
