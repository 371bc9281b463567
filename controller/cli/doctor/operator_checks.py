"""What an operator's commands need: a credential, and a controller that knows it and tells the same time."""

from datetime import UTC, datetime
from importlib.metadata import version

from controller.cli.client import ControllerAway, ControllerClient, Refused
from controller.cli.options import Options, client_for
from core.doctor import Check, Finding, ok, problem, skipped, warning
from core.errors import NanofleetError
from core.machine_checks import clocks_agree


def operator_checks(options: Options) -> dict[str, Check]:
    """Return every check, by name."""
    return {
        "credential": lambda: _credential(options),
        "controller": lambda: _controller(options),
        "clock skew": lambda: _clock_skew(options),
    }


def _credential(options: Options) -> Finding:
    try:
        file = options.credential_file()
    except NanofleetError as error:
        return problem("credential", str(error), expected="a private credential file", remedy="see what was found")
    if file.credential is None:
        return skipped("credential", f"none at {file.path}; an operator's commands need one")
    return ok("credential", f"{file.credential.name} at {file.credential.controller}, in {file.path}")


def _controller(options: Options) -> Finding:
    try:
        with client_for(options) as client:
            theirs, ours = client.health().version, version("nanofleet")
            if client.credential is None:
                return ok("controller", f"{client.url} answers, version {theirs}; nobody was shown to it")
            me = client.me()
    except ControllerAway as error:
        remedy = "start it, or name its address with --controller; from elsewhere: is its port open in the firewall?"
        return problem("controller", str(error), expected="a controller that answers", remedy=remedy)
    except Refused as error:
        remedy = "ask an admin for `nanofleet operators rotate`, or an owner for `controller init --reset-admin`"
        return problem("controller", str(error), expected="to be let in", remedy=remedy)
    if theirs != ours:
        return warning(
            "controller",
            f"{client.url} has version {theirs}, this command {ours}",
            expected="the same version",
            remedy="upgrade the older of the two",
        )
    return ok("controller", f"{client.url} answers, version {theirs}, and knows us as {me.name} ({me.role})")


def _clock_skew(options: Options) -> Finding:
    try:
        with client_for(options) as client:
            return _compared(client)
    except NanofleetError:
        return skipped("clock skew", "the controller does not answer us")


def _compared(client: ControllerClient) -> Finding:
    theirs = client.now()
    if theirs is None:
        return skipped("clock skew", "the controller does not say what time it is")
    return clocks_agree(datetime.now(UTC), theirs, whose=f"the controller at {client.url}")
