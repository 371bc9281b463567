"""The stock `tritonclient` in an environment of its own, and its programs of checks as processes.

It is an environment of its own because tritonclient brings the same protobuf symbols as ours; pinned and hashed in
`deploy/requirements/conformance.lock`.
"""

import json
import subprocess
from collections.abc import Sequence

from tests.support.locked_environment import ROOT, locked_environment

CHECKS_TIMEOUT_S = 120


def run_checks(program: str, address: str, *checks: str, proof: Sequence[str] = ()) -> dict[str, str]:
    """Run `tests.conformance.clients.<program>`, all or only the named checks; return check → "" or what went wrong.

    `proof` is the program's option that says who asks.
    """
    python = str(locked_environment("conformance") / "python")
    command = [python, "-m", f"tests.conformance.clients.{program}", *proof, address, *checks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHECKS_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads(done.stdout)
    return results
