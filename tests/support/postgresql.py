"""A real PostgreSQL on a free loopback port, for tests that need a server to be one.

    with running_postgresql() as server:
        url = server.new_database()          # empty, nobody else's
        Database(url, password_file=server.password_file)
        server.stop()                        # the server is gone, its port stays known
        server.start()                       # and it is back, on the same port

It runs as the user `postgres` where the tests run as root, which it refuses to do, so its files are in a folder of its
own. It waits for no disk: a power cut is not among the tests.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

from controller.demo.ports import free_port
from tests.support.mosquitto import MissingProgram

HOST = "127.0.0.1"
USER = "nanofleet"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "max_connections": "40",
    "log_min_messages": "warning",
}


class Postgresql:
    """One server process that can be started again after it was stopped."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.port = free_port()
        self.password_file = folder / "password"
        self._folder = folder
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = count(1)
        self.password_file.write_text("correct horse\n")
        self._own(folder, self.password_file)
        self._initialise()

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        command: list[str | Path] = [self._programs / "postgres", "-D", self._folder / "data", "-p", str(self.port)]
        command += [f"--{name}={value}" for name, value in _SETTINGS.items()]
        user = _as_postgres()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **user
            )
        self._await_answer(self._process)

    def stop(self) -> None:
        """Cut off every client and end it, as `systemctl stop` does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def new_database(self, made: str = "ENCODING 'UTF8' LOCALE 'C'") -> str:
        """Make an empty database; return its URL, to be used with `password_file`."""
        name = f"test_{next(self._numbers)}"
        with self.session() as connection:
            connection.autocommit = True
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 {made}".encode())
        return f"postgresql+psycopg://{USER}@{HOST}:{self.port}/{name}"

    def session(self, url: str = "/postgres") -> psycopg.Connection[tuple[Any, ...]]:
        """Return somebody else's connection to the database of `url`, with every right."""
        return psycopg.connect(
            host=HOST,
            port=self.port,
            user=USER,
            password=self.password_file.read_text().strip(),
            dbname=url.rpartition("/")[2],
            connect_timeout=5,
        )

    @property
    def log_path(self) -> Path:
        return self._folder / "postgres.log"

    def _initialise(self) -> None:
        command: list[str | Path] = [
            *(self._programs / "initdb", "-D", self._folder / "data", "-U", USER, "--no-sync"),
            *("--auth=scram-sha-256", f"--pwfile={self.password_file}", "--encoding=UTF8", "--locale=C"),
        ]
        subprocess.run(command, cwd=self._folder, check=True, stdout=subprocess.DEVNULL, **_as_postgres())

    def _own(self, *paths: Path) -> None:
        if os.geteuid() == 0:
            for path in paths:
                shutil.chown(path, "postgres", "postgres")

    def _await_answer(self, process: subprocess.Popen[bytes]) -> None:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_s and process.poll() is None:
            try:
                self.session().close()
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(
            f"PostgreSQL on port {self.port} did not start; its log: {self.log_path.read_text()[-2000:]}"
        )


@contextmanager
def running_postgresql() -> Iterator[Postgresql]:
    """Yield a running server; it and its files are gone afterwards.

    Raises:
        MissingProgram: it is not installed.
    """
    programs = postgresql_programs()
    folder = Path(tempfile.mkdtemp(prefix="nanofleet-postgresql-"))
    try:
        server = Postgresql(folder, programs)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def postgresql_programs() -> Path:
    """Return the folder of the server's programs, the newest release's; Debian keeps them off the PATH.

    Raises:
        MissingProgram: it is not installed.
    """
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if (found := shutil.which("postgres")) is not None:
        folders.append(Path(found).resolve().parent)
    if not folders:
        raise MissingProgram("postgres is not installed (Debian: apt install postgresql)")
    return max(folders, key=_release)


def _release(programs: Path) -> int:
    return int(programs.parent.name) if programs.parent.name.isdigit() else 0


def _as_postgres() -> dict[str, Any]:
    """Return what makes a child process the server's user, if this one is root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
