"""`nanofleet-agent`: let this machine into a fleet, run an agent, or ask how one is.

Nothing heavy is imported before the command is known: `--help` answers at once also on a small machine.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_agent.trust.tuf_client import add_arguments

STDIN = "-"
_EPILOG = """\
examples:
  nanofleet-agent enrol - --config agent.toml --name gate-1 < token
  nanofleet-agent run --config agent.toml
  nanofleet-agent status --config agent.toml --watch
  nanofleet-agent doctor --config agent.toml --output json
  nanofleet-agent samples export --config agent.toml --out hard

exit codes: 0 done; 1 refused or failed, for doctor: a problem; 2 wrong usage;
3 (status only) the agent does not run; 130 interrupted with Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 for a refusal with its reason, 2 for wrong words, 130 for Ctrl-C.

    `status` says by 3 that the agent does not run, `doctor` by 1 that there is a problem.
    """
    options = parser().parse_args(arguments)
    # Before anything imports ONNX Runtime, or it starts a telemetry thread and writes to the user's cache folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # No child of ours uses gRPC's state, and its fork handlers complain for each.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # It writes every refused connection to standard error; what matters of it comes back as an error and is logged.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from core.errors import NanofleetError

    try:
        return _COMMANDS[options.command](options)
    except NanofleetError as error:
        sys.stderr.write(f"nanofleet-agent: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Return what knows every command and its options."""
    root = argparse.ArgumentParser(
        prog="nanofleet-agent",
        description="Runs models next to the devices.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True)
    enrol = commands.add_parser(
        "enrol", help="let this machine into a fleet, with a token of `nanofleet devices token`"
    )
    enrol.add_argument("token", metavar="TOKEN", help="the token; - reads it from standard input")
    _add_place(enrol)
    enrol.add_argument("--name", metavar="AGENT", help="the name that this agent would like")
    enrol.add_argument("--force", action="store_true", help="give up the identity that is here")
    run = commands.add_parser("run", help="run an agent until it is told to stop")
    run.add_argument("--config", type=Path, metavar="FILE", help="TOML settings; NANOFLEET_AGENT_* variables win")
    status = commands.add_parser("status", help="say how the agent on this machine is")
    _add_place(status)
    shown = status.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="the same as --output json")
    shown.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how to print the result")
    status.add_argument("-w", "--watch", action="store_true", help="show it again whenever it changes, until Ctrl-C")
    doctor = commands.add_parser("doctor", help="find what is set up wrong on this machine, and say the remedy")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="the TOML settings that the agent runs with")
    doctor.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how to print the result")
    retry = commands.add_parser("retry", help="let a model that failed here be tried again; the agent must not run")
    retry.add_argument("model", metavar="MODEL")
    _add_place(retry)
    _add_samples(commands.add_parser("samples", help="hard examples on this machine: list, export or remove them"))
    tuf_client = commands.add_parser("tuf-client", help="verify a catalogue: the TUF conformance suite's client")
    add_arguments(tuf_client)
    return root


def _add_samples(samples: argparse.ArgumentParser) -> None:
    does = samples.add_subparsers(dest="does", required=True)
    listed = does.add_parser("list", help="say how many there are")
    _add_place(listed)
    listed.add_argument("-o", "--output", choices=("table", "json"), default="table", help="how to print the result")
    exported = does.add_parser("export", help="copy them into a folder, also those that may not leave the site")
    _add_place(exported)
    exported.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="made when missing")
    purged = does.add_parser("purge", help="remove them; the agent may run")
    _add_place(purged)
    for command in (exported, purged):
        command.add_argument("--model", metavar="MODEL", help="only those of this model")


def _add_place(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--config", type=Path, metavar="FILE", help="the TOML settings that the agent runs with")
    place.add_argument("--state-dir", type=Path, metavar="FOLDER", help="the agent's state folder")


def _place(options: argparse.Namespace) -> Path:
    from edge_agent.settings import load_settings

    state_dir: Path | None = options.state_dir
    return load_settings(options.config).state_dir if state_dir is None else state_dir


def _run(options: argparse.Namespace) -> int:
    from edge_agent.main import run_agent
    from edge_agent.settings import load_settings

    run_agent(load_settings(options.config))
    return 0


def _status(options: argparse.Namespace) -> int:
    from edge_agent.health.report import show_status, watch_status
    from edge_agent.health.state_folder import StateFolder

    folder, as_json = StateFolder(_place(options)), options.json or options.output == "json"
    return watch_status(folder, as_json=as_json) if options.watch else show_status(folder, as_json=as_json)


def _doctor(options: argparse.Namespace) -> int:
    from edge_agent.doctor.command import examine

    return examine(options.config, as_json=options.output == "json")


def _enrol(options: argparse.Namespace) -> int:
    from core.enrolment_token import MAX_TOKEN_CHARS, parse_token
    from edge_agent.health.handover import making_room
    from edge_agent.health.state_folder import StateFolder
    from edge_agent.identity.enrol import enrol
    from edge_agent.identity.folder import IdentityFolder

    text = sys.stdin.readline(MAX_TOKEN_CHARS + 2) if options.token == STDIN else options.token
    folder = StateFolder(_place(options))
    with folder.locked():
        identity = enrol(
            parse_token(text.strip()),
            IdentityFolder(folder.identity),
            root_file=folder.root,
            wanted_id=options.name,
            force=options.force,
            make_room=making_room(folder),
        )
    sys.stdout.write(
        f"this machine is agent {identity.agent_id} of site {identity.site}; `nanofleet-agent run` runs it\n"
    )
    return 0


def _samples(options: argparse.Namespace) -> int:
    from edge_agent.health.state_folder import StateFolder
    from edge_agent.identity.folder import IdentityFolder, NotEnrolled
    from edge_agent.samples import command

    folder = StateFolder(_place(options))
    if options.does == "list":
        return command.list_samples(folder.samples, as_json=options.output == "json")
    if options.does == "purge":
        return command.purge_samples(folder.samples, model=options.model)
    try:
        agent = str(IdentityFolder(folder.identity).load().agent_id)
    except NotEnrolled:
        agent = command.NOBODY
    return command.export_samples(folder.samples, options.out, agent=agent, model=options.model)


def _retry(options: argparse.Namespace) -> int:
    from core.clock import SystemClock
    from core.ids import ModelName
    from edge_agent.activation.journal import Journal
    from edge_agent.health.state_folder import StateFolder

    folder = StateFolder(_place(options))
    with folder.locked():
        released = Journal(folder.journal, clock=SystemClock()).release(ModelName(options.model))
    names = ", ".join(f"{entry.slot.model}:{entry.slot.version} {entry.slot.variant}" for entry in released)
    sys.stdout.write(f"may be tried again: {names}\n" if released else f"{options.model}: nothing was in quarantine\n")
    return 0


def _tuf_client(options: argparse.Namespace) -> int:
    from edge_agent.trust import tuf_client

    return tuf_client.run(options)


_COMMANDS = {
    "enrol": _enrol,
    "run": _run,
    "status": _status,
    "doctor": _doctor,
    "retry": _retry,
    "samples": _samples,
    "tuf-client": _tuf_client,
}


if __name__ == "__main__":
    sys.exit(main())
