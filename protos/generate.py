"""Generate the Python code of every `.proto` file, or check that it is fresh.

Protobuf code loads with the runtime of its own or a newer version, never an older one, so the compiler is pinned to an
old release and lives in an environment of its own under `build/`, away from the runtime that the product uses.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "requirements" / "protoc.lock"
TOOL = ROOT / "build" / "protoc"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when generated code is stale")
    check = parser.parse_args().check
    python = compiler()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        compile_protos(python, out)
        fresh = {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    stale = [name for name, content in fresh.items() if not is_same(ROOT / name, content)]
    orphans = [path.relative_to(ROOT) for path in generated_files() if path.relative_to(ROOT) not in fresh]
    if check:
        for name in (*stale, *orphans):
            print(f"stale: {name}; run `make protos`", file=sys.stderr)
        return 1 if stale or orphans else 0
    for name in stale:
        (ROOT / name).write_bytes(fresh[name])
        print(f"wrote {name}")
    for name in orphans:
        (ROOT / name).unlink()
        print(f"removed {name}")
    return 0


def compiler() -> Path:
    """Return the interpreter of the compiler's environment, made anew when the lock file changed."""
    python = TOOL / "bin" / "python"
    stamp = TOOL / "installed.lock"
    if stamp.exists() and stamp.read_bytes() == LOCK.read_bytes():
        return python
    shutil.rmtree(TOOL, ignore_errors=True)
    venv.create(TOOL, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--require-hashes", "-r", LOCK], check=True)
    shutil.copyfile(LOCK, stamp)
    return python


def compile_protos(python: Path, out: Path) -> None:
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "protos").glob("*/v*/*.proto"))]
    plugins = [f"--plugin={name}={python.parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    quiet = ["--mypy_opt=quiet", "--mypy_grpc_opt=quiet"]
    command = [str(python), "-m", "grpc_tools.protoc", "-I.", *plugins, *outputs, *quiet, *sources]
    subprocess.run(command, cwd=ROOT, check=True)


def generated_files() -> list[Path]:
    return [path for path in (ROOT / "protos").rglob("*_pb2*") if path.name.endswith(SUFFIXES)]


def is_same(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


if __name__ == "__main__":
    sys.exit(main())
