"""A virtual environment with the agent extra and nothing else, at the pinned versions: what a device would have.

Made once per lock file under build/venvs/ (half a minute), the project itself installed anew each time, as a wheel.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from core.digest import digest_of

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy" / "requirements"
ENVIRONMENT = ROOT / "build" / "venvs" / "agent"
INSTALL_TIMEOUT_S = 600.0
# One line per package: name==version, maybe a marker, then hashes on lines of their own.
_PIN = re.compile(r"^[a-z0-9][^\\\n]*==[^\\\n]*", re.MULTILINE | re.IGNORECASE)


def agent_environment(folder: Path = ENVIRONMENT) -> Path:
    """Return the environment's `bin` folder, with the present sources installed."""
    pins = _pins()
    stamp = folder / "installed-for"
    wanted = digest_of(f"{sys.version}\n{pins}".encode())
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _install(folder, pins, ".[agent]")
        stamp.write_text(wanted)
    else:
        _install(folder, pins, "--no-deps", "--force-reinstall", ".")
    return folder / "bin"


def _pins() -> str:
    """Return the agent's pins and those of the build backend, without hashes, which a local folder cannot have."""
    agent = set(_PIN.findall((LOCKS / "agent.lock").read_text()))
    build = {pin for pin in _PIN.findall((LOCKS / "dev.lock").read_text()) if pin.startswith("hatchling==")}
    return "".join(f"{pin.strip()}\n" for pin in sorted(agent | build))


def _install(folder: Path, pins: str, *what: str) -> None:
    constraints = folder / "constraints.txt"
    constraints.write_text(pins)
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what],
        cwd=ROOT,
        # By variable, because the environment that builds the wheel reads it too.
        env={**os.environ, "PIP_CONSTRAINT": str(constraints)},
        check=True,
        timeout=INSTALL_TIMEOUT_S,
    )
