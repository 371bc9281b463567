"""The environment of the stock `tritonclient`, made on demand, and its programs of checks as processes.

It is an environment of its own because tritonclient brings the same protobuf symbols as ours; pinned and hashed in
`deploy/requirements/conformance.lock`.
"""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from core.digest import digest_of_file

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "deploy/requirements/conformance.lock"
FOLDER = ROOT / "build/venvs/tritonclient"
INSTALL_TIMEOUT_S = 600
CHECKS_TIMEOUT_S = 120


@cache
def triton_python() -> str:
    """Return the interpreter of the environment; the first call on a machine installs it, which takes half a minute."""
    stamp, digest = FOLDER / "installed", digest_of_file(LOCK)
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    # Two test runs at a time must not install into each other's folder.
    with FOLDER.with_suffix(".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest:
            _install(FOLDER)
            stamp.write_text(digest)
    return _python(FOLDER)


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=INSTALL_TIMEOUT_S)
    pip = [_python(folder), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    subprocess.run([*pip, "-r", str(LOCK)], check=True, timeout=INSTALL_TIMEOUT_S)


def _python(folder: Path) -> str:
    return str(folder / "bin/python")


def run_checks(program: str, address: str, *checks: str, proof: Sequence[str] = ()) -> dict[str, str]:
    """Run `tests.conformance.clients.<program>`, all or only the named checks; return check → "" or what went wrong.

    `proof` is the program's option that says who asks.
    """
    command = [triton_python(), "-m", f"tests.conformance.clients.{program}", *proof, address, *checks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHECKS_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    results: dict[str, str] = json.loads(done.stdout)
    return results
