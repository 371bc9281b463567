"""Environments of their own for programs that tests run as processes: pinned, hashed, made on demand, kept in build/.

They are not ours because they bring what ours must not have, or may not have in another version.
"""

import fcntl
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from core.digest import digest_of_file

ROOT = Path(__file__).parents[2]
INSTALL_TIMEOUT_S = 600


@cache
def locked_environment(name: str) -> Path:
    """Return the `bin` folder of the environment of `deploy/requirements/<name>.lock`; the first call installs it."""
    lock, folder = ROOT / f"deploy/requirements/{name}.lock", ROOT / "build/venvs" / name
    stamp, digest = folder / "installed", digest_of_file(lock)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two test runs at a time must not install into each other's folder.
    with folder.with_suffix(".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest:
            _install(folder, lock)
            stamp.write_text(digest)
    return folder / "bin"


def _install(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=INSTALL_TIMEOUT_S)
    pip = [
        str(folder / "bin/python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
    ]
    subprocess.run([*pip, "-r", lock], check=True, timeout=INSTALL_TIMEOUT_S)
