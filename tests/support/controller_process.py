"""The controller as a process of its own, as an operator runs it, without a heavy tier."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class ControllerProcess:
    """Use as a context manager; afterwards the process is gone."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self._data_dir = data_dir
        self._log = data_dir.with_suffix(".log")
        self._environment = {
            "NANOFLEET_DATA_DIR": str(data_dir),
            "NANOFLEET_GRPC_BIND": "127.0.0.1:0",
            "NANOFLEET_HTTP_BIND": "127.0.0.1:0",
            "NANOFLEET_HEAVY__MODE": "url",
            # The discard port: nobody listens there.
            "NANOFLEET_HEAVY__URL": "http://127.0.0.1:9",
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = (
            "from controller.main import main; from controller.settings import load_settings; main(load_settings(None))"
        )
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", command],
                env={**os.environ, **self._environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._running.poll() is None:
            self._running.kill()
        self._running.wait()

    @property
    def endpoints_file(self) -> Path:
        return self._data_dir / "endpoints.json"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def endpoints(self) -> dict[str, str]:
        """Wait until it is ready; return where it listens."""
        until = time.monotonic() + START_TIMEOUT_S
        while not self.endpoints_file.exists():
            assert self._running.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.05)
        endpoints: dict[str, str] = json.loads(self.endpoints_file.read_bytes())
        return endpoints

    def send(self, signum: signal.Signals) -> None:
        self._running.send_signal(signum)

    def exit_code(self) -> int:
        """Wait until it has ended by itself."""
        return self._running.wait(STOP_TIMEOUT_S)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process
