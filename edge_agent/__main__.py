"""`nanofleet-agent`: run an agent, or ask how one is.

Nothing heavy is imported before the command is known: `--help` answers at once also on a small machine.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 for a refusal with its reason, 2 for wrong words."""
    options = _parser().parse_args(arguments)
    # Before anything imports ONNX Runtime, or it starts a telemetry thread and writes to the user's cache folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from core.errors import NanofleetError

    try:
        return _run(options) if options.command == "run" else _status(options)
    except NanofleetError as error:
        sys.stderr.write(f"nanofleet-agent: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nanofleet-agent", description="Runs models next to the devices.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run an agent until it is told to stop")
    run.add_argument("--config", type=Path, metavar="FILE", help="TOML settings; NANOFLEET_AGENT_* variables win")
    status = commands.add_parser("status", help="say how the agent on this machine is")
    place = status.add_mutually_exclusive_group()
    place.add_argument("--config", type=Path, metavar="FILE", help="the TOML settings that the agent runs with")
    place.add_argument("--state-dir", type=Path, metavar="FOLDER", help="the agent's state folder")
    status.add_argument("--json", action="store_true", help="for machines")
    return parser


def _run(options: argparse.Namespace) -> int:
    from edge_agent.main import run_agent
    from edge_agent.settings import load_settings

    run_agent(load_settings(options.config))
    return 0


def _status(options: argparse.Namespace) -> int:
    from edge_agent.health.report import show_status
    from edge_agent.health.state_folder import StateFolder

    state_dir: Path | None = options.state_dir
    if state_dir is None:
        from edge_agent.settings import load_settings

        state_dir = load_settings(options.config).state_dir
    return show_status(StateFolder(state_dir), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
