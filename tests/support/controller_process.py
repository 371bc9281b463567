"""The controller as a process of its own, as an operator runs it, without a heavy tier."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import httpx

from controller import foundation
from controller.access.model import OperatorRole
from controller.cli.credential import Credential, write_credential
from controller.cli.processes import GRPC_ENVIRONMENT
from controller.identity.authority import CertificateAuthority, key_pem, new_key, public_key_of
from controller.identity.keys import AuthorityKeys
from controller.settings import Settings
from core.clock import SystemClock
from core.grpc_transport import TlsIdentity
from core.spiffe import Peer, Role

ADMIN = "test-admin"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    secret: str
    authority: CertificateAuthority


class ControllerProcess:
    """Use as a context manager; afterwards the process is gone. What it stands on, and an admin, are made before."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self._data_dir = data_dir
        self._log = data_dir.with_suffix(".log")
        self._environment = {
            "NANOFLEET_DATA_DIR": str(data_dir),
            "NANOFLEET_GRPC_BIND": "127.0.0.1:0",
            "NANOFLEET_ENROLMENT_BIND": "127.0.0.1:0",
            "NANOFLEET_HTTP_BIND": "127.0.0.1:0",
            "NANOFLEET_HEAVY__MODE": "url",
            # The discard port: nobody listens there.
            "NANOFLEET_HEAVY__URL": "http://127.0.0.1:9",
            **GRPC_ENVIRONMENT,
            **environment,
        }
        # In a thread, because the caller's may have a loop that runs.
        with ThreadPoolExecutor(1) as thread:
            self._prepared = thread.submit(lambda: asyncio.run(_prepare(_settings(data_dir, environment)))).result()
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

    @property
    def secret(self) -> str:
        """The admin's."""
        return self._prepared.secret

    @property
    def bearer(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}

    @property
    def trust_bundle(self) -> bytes:
        return self._prepared.authority.certificate_pem

    def tls(self, role: Role, name: str) -> TlsIdentity:
        """Return what a peer proves itself with, as if it had enrolled."""
        key, authority = new_key(), self._prepared.authority
        peer = Peer(authority.trust_domain, role, name)
        certificate = authority.issue(peer, public_key_of(key.public_key()), now=datetime.now(UTC))
        return TlsIdentity(certificate.pem, key_pem(key), authority.certificate_pem)

    def endpoints(self) -> dict[str, str]:
        """Wait until it is ready; return where it listens."""
        until = time.monotonic() + START_TIMEOUT_S
        while not self.endpoints_file.exists():
            assert self._running.poll() is None, self.log
            assert time.monotonic() < until, self.log
            time.sleep(0.05)
        endpoints: dict[str, str] = json.loads(self.endpoints_file.read_bytes())
        return endpoints

    def credential(self) -> Path:
        """Wait until it is ready; return the admin's credential, for `nanofleet --credential`."""
        path = self._data_dir.with_suffix(".credential")
        url = self.endpoints()["controller_http"]
        write_credential(path, Credential(controller=url, name=ADMIN, secret=self.secret))
        return path

    def http(self) -> httpx.AsyncClient:
        """Wait until it is ready; return an operator's client."""
        return httpx.AsyncClient(base_url=self.endpoints()["controller_http"], headers=self.bearer)

    def send(self, signum: signal.Signals) -> None:
        self._running.send_signal(signum)

    def exit_code(self) -> int:
        """Wait until it has ended by itself."""
        return self._running.wait(STOP_TIMEOUT_S)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process


def _settings(data_dir: Path, environment: Mapping[str, str]) -> Settings:
    """Return what decides where the process will find what is prepared for it."""
    url, password_file = (environment.get(f"NANOFLEET_DATABASE_{name}") for name in ("URL", "PASSWORD_FILE"))
    if url is None or password_file is None:
        return Settings(data_dir=data_dir)
    return Settings(data_dir=data_dir, database_url=url, database_password_file=Path(password_file))


async def _prepare(settings: Settings) -> _Prepared:
    async with AsyncExitStack() as stack:
        laid = await foundation.lay(settings, stack, clock=SystemClock())
        is_known = ADMIN in {operator.name for operator in await laid.access.operators()}
        issued = await (laid.access.rotate(ADMIN) if is_known else laid.access.create(ADMIN, OperatorRole.ADMIN))
        record = laid.identity.authorities()[0]
        key = AuthorityKeys(settings.keys_dir / "authorities").load(record.sha256)
        return _Prepared(issued.secret, CertificateAuthority.load(record.certificate.encode(), key))
