#!/usr/bin/env python3
"""Make the bundle of a release: one file with which a host installs it, needing no package index and no compiler.

    ansible/bundle.py agent                                       for machines like this one
    ansible/bundle.py agent --platform manylinux_2_28_aarch64     for others, such as a Raspberry Pi

    nanofleet-agent-0.1.0.tar
        wheels/…              every wheel of the lock, and nanofleet's own
        requirements.lock     their hashes, which the host checks once more

The same inputs give the same bytes, so a host can tell by the digest that it has a bundle already.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deploy/requirements"
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder) / "wheels"
        wheels.mkdir()
        own = _own_wheel(options.source, wheels)
        _download(options.lock, wheels, options)
        version = re.fullmatch(r"nanofleet-([^-]+)-.*\.whl", own.name)
        assert version is not None, f"expected a wheel of nanofleet, got {own.name}"
        target: Path = options.output / f"nanofleet-{options.side}-{version[1]}.tar"
        target.parent.mkdir(parents=True, exist_ok=True)
        _pack(target, wheels, options.lock)
    sys.stdout.write(f"{target}\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("controller", "agent"))
    parser.add_argument("--lock", type=Path, help="another lock file than that of the side")
    parser.add_argument("--source", type=Path, default=ROOT, help="the sources, or a wheel of nanofleet")
    parser.add_argument("--output", type=Path, default=ROOT / "build/bundles", help="folder of the bundle")
    parser.add_argument("--python", default="3.11", metavar="VERSION", help="of the hosts; 3.11 is Debian 12's")
    parser.add_argument("--platform", action="append", metavar="TAG", help="of the hosts; may be given again")
    options = parser.parse_args()
    options.lock = options.lock or LOCKS / f"{options.side}.lock"
    return options


def _own_wheel(source: Path, wheels: Path) -> Path:
    if source.suffix == ".whl":
        return Path(shutil.copy(source, wheels))
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    return next(wheels.glob("nanofleet-*.whl"))


def _download(lock: Path, wheels: Path, options: argparse.Namespace) -> None:
    """Fetch every wheel of the lock for the hosts; none is built, so none can be of this machine by mistake."""
    platforms = [word for tag in options.platform or () for word in ("--platform", tag)]
    only = ["--only-binary", ":all:", "--python-version", options.python, *platforms]
    subprocess.run([*PIP, "download", "--require-hashes", "-r", lock, "--dest", wheels, *only], check=True)


def _pack(target: Path, wheels: Path, lock: Path) -> None:
    """Write the files in a fixed order, without times and owners."""
    partial = target.with_suffix(".partial")
    with tarfile.open(partial, "w") as bundle:
        for wheel in sorted(wheels.iterdir()):
            _add(bundle, f"wheels/{wheel.name}", wheel.read_bytes())
        _add(bundle, "requirements.lock", lock.read_bytes())
    partial.replace(target)


def _add(bundle: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    bundle.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
