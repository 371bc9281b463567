"""The child process of the embedded heavy tier: a local Ray with the Serve application while the parent lives.

    python -m controller.heavy.embedded '{"state_dir": "…", …}'     ClusterArguments as JSON; `controller.heavy.local`

It ends on SIGTERM, on Ctrl-C, and when its standard input closes, which is how it learns that its parent has died.
Ray's settings are environment variables that it reads at import, so they are set before; that is why this is not in
`application`. Only `application` imports ray.
"""

import hashlib
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from controller.heavy.arguments import ClusterArguments
from core.atomic_files import write_atomically
from core.grpc_transport import MAX_MESSAGE_BYTES

# Ray binds a socket at <session dir>/session_<date>_<pid>/sockets/plasma_store, AF_UNIX paths end at 107 bytes, and
# what Ray adds takes 63 of them.
_MAX_SESSION_DIR_CHARS = 40
# serve.shutdown and ray.shutdown take 3 to 5 s (measured); after this the process ends by force, and Ray with it.
_STOP_TIMEOUT_S = 15.0


def ray_environment(token_file: Path) -> Mapping[str, str]:
    """Return the environment that makes a local Ray private, quiet and fast.

    Measured on 2 cores with a trivial method: HTTP p50 4.3-5.9 ms by default, 2.45 ms with these settings.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # From the proxy to a replica; the default of 4 MiB is less than a request may have.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(MAX_MESSAGE_BYTES),
        # Bounds of the session's log files.
        "RAY_ROTATION_MAX_BYTES": str(8 << 20),
        "RAY_ROTATION_BACKUP_COUNT": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }


def write_token(state_dir: Path) -> Path:
    """Write a new cluster token that only this user can read; Ray's own would be world-readable in the home folder."""
    token_file = state_dir / "ray-token"
    write_atomically(token_file, secrets.token_hex(32).encode(), mode=0o600)
    return token_file


def make_private(folder: Path) -> None:
    """Make `folder`, or make it ours alone: Ray opens its session folder to everybody, so what is above it must not be.

    Raises:
        PermissionError: it belongs to somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"expected {folder} to be a folder of this user; remove it, or set TMPDIR elsewhere")
    folder.chmod(0o700)


def prepare_session_dir(state_dir: Path, *, temporary: Path) -> Path:
    """Return an empty folder for Ray's sessions inside a private one; what an earlier run left there is deleted.

    It lies in `state_dir` when that is short enough, otherwise in `temporary` under a name that follows from
    `state_dir`.
    """
    folder = state_dir / "ray"
    if len(str(folder)) > _MAX_SESSION_DIR_CHARS:
        name = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]
        private = temporary / f"nanofleet-{name}"
        make_private(private)
        folder = private / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def remove_session_dir(session_dir: Path, state_dir: Path) -> None:
    """Undo `prepare_session_dir`."""
    shutil.rmtree(session_dir if session_dir.parent == state_dir else session_dir.parent, ignore_errors=True)


def main() -> None:
    arguments = ClusterArguments.model_validate_json(sys.argv[1])
    make_private(arguments.state_dir)
    os.environ.update(ray_environment(write_token(arguments.state_dir)))
    # A cluster named in the caller's environment is not ours.
    os.environ.pop("RAY_ADDRESS", None)
    session_dir = prepare_session_dir(arguments.state_dir, temporary=Path(tempfile.gettempdir()))
    ending = threading.Event()
    threading.Thread(target=watch_parent, args=(ending,), name="parent-watch", daemon=True).start()
    from controller.heavy import application

    try:
        application.start_cluster(arguments, session_dir=session_dir)
        # Not before: ray.init installs handlers of its own, which end a start that is asked to.
        signal.signal(signal.SIGTERM, lambda *_: ending.set())
        signal.signal(signal.SIGINT, lambda *_: ending.set())
        ending.wait()
    finally:
        _force_the_end_after(_STOP_TIMEOUT_S)
        application.stop_cluster()
        remove_session_dir(session_dir, arguments.state_dir)


def watch_parent(ending: threading.Event, *, force_after_s: float = _STOP_TIMEOUT_S) -> None:
    """Set `ending` when the parent is gone, and end this process by force unless it has ended itself soon after."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    ending.set()
    # A start that hangs never looks at `ending`, and nobody is left to end it from outside.
    _force_the_end_after(force_after_s)


def _force_the_end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
