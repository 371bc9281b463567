"""A real mosquitto on a free loopback port, for tests that need a broker to be one.

    with running_mosquitto(tmp_path) as broker:
        connect("127.0.0.1", broker.port)
        broker.kill()      # the broker is gone, its port stays known
        broker.start()     # and it is back, on the same port

It keeps sessions and queued messages in `folder` only when `persistent`, and is otherwise set up as our deployments
are: defaults, except that Nagle's algorithm is off (with it a QoS 1 round trip takes 44 ms instead of 0.6,
measured).
"""

import getpass
import shutil
import socket
import subprocess
import time
import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.demo.ports import free_port

HOST = "127.0.0.1"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0


class Mosquitto:
    """One broker process that can be started again after it was stopped or killed."""

    def __init__(self, folder: Path, *, persistent: bool = False, nodelay: bool = True, acl: str = "") -> None:
        self.host = HOST
        self.port = free_port()
        self._folder = folder
        self._config = folder / "mosquitto.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self._config.write_text(self._config_text(persistent=persistent, nodelay=nodelay))
        if acl:
            (folder / "acl").write_text(acl)
            with self._config.open("a") as config:
                config.write(f"acl_file {folder / 'acl'}\n")

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def log_path(self) -> Path:
        return self._folder / "mosquitto.log"

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [mosquitto_path(), "-c", str(self._config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._await_listening(self._process)

    def stop(self) -> None:
        """Ask it to end, so that it saves what it keeps, and wait until it has."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def _await_listening(self, process: subprocess.Popen[bytes]) -> None:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_s:
            if process.poll() is not None:
                break
            try:
                socket.create_connection((self.host, self.port), timeout=1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"mosquitto on port {self.port} did not start; its log: {self.log_path.read_text()[-2000:]}")

    def _config_text(self, *, persistent: bool, nodelay: bool) -> str:
        lines = [
            f"listener {self.port} {self.host}",
            "allow_anonymous true",
            f"set_tcp_nodelay {'true' if nodelay else 'false'}",
            "log_type error",
            "log_type warning",
            f"persistence {'true' if persistent else 'false'}",
            f"persistence_location {self._folder}/",
            # Started by root it would become another user, who cannot write to the folder.
            f"user {getpass.getuser()}",
        ]
        return "\n".join(lines) + "\n"


@contextmanager
def running_mosquitto(
    folder: Path, *, persistent: bool = False, nodelay: bool = True, acl: str = ""
) -> Iterator[Mosquitto]:
    """Yield a running broker whose files are in `folder`; it is gone afterwards. `acl`: the lines of its ACL file."""
    broker = Mosquitto(folder, persistent=persistent, nodelay=nodelay, acl=acl)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


class MissingProgram(unittest.SkipTest):
    """A program that a test needs is not installed: the test is skipped, except in continuous integration."""


def mosquitto_path() -> str:
    """Return where mosquitto is."""
    return program_path("mosquitto")


def program_path(name: str) -> str:
    """Return where a program is; Debian keeps servers in /usr/sbin, which is not on everybody's PATH.

    Raises:
        MissingProgram: it is not installed.
    """
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        raise MissingProgram(f"{name} is not installed; .ci/run names the Debian packages of every program")
    return path
