"""A real Prometheus on a free loopback port, on the configuration that we ship.

with running_prometheus(folder, secret=…, controller="127.0.0.1:7080", agents=["127.0.0.1:7180"]) as prometheus:
    prometheus.query("up")
"""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson

from controller.demo.ports import free_port
from tests.support.mosquitto import program_path

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "prometheus"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
_INTERVAL = "interval: 15s"


class Prometheus:
    def __init__(self, port: int) -> None:
        self._api = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> Sequence[Mapping[str, Any]]:
        """Return the vector of an instant query."""
        return list(self._get("query", query=expression)["result"])

    def names(self) -> set[str]:
        """Return the names of all series, recorded ones too."""
        return set(self._get("label/__name__/values"))

    def rules(self) -> Sequence[Mapping[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> Sequence[Mapping[str, Any]]:
        return list(self._get("targets")["activeTargets"])

    def exemplars(self, expression: str) -> Sequence[Mapping[str, Any]]:
        now_s = time.time()
        found = self._get("query_exemplars", query=expression, start=str(now_s - 300), end=str(now_s + 60))
        return [exemplar for series in found for exemplar in series["exemplars"]]

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._api}/-/ready", timeout=2).is_success
        except httpx.TransportError:
            return False

    def _get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self._api}/api/v1/{path}", params=parameters, timeout=10)
        assert answer.is_success, answer.text
        return answer.json()["data"]


def configured(folder: Path, *, secret: str, controller: str, agents: Sequence[str]) -> Path:
    """Write the shipped configuration to `folder`, with a secret and targets of this machine; return its path."""
    shutil.copytree(CONFIGURATION, folder)
    (folder / "nanofleet.secret").write_text(secret)
    (folder / "targets" / "controller.yml").write_bytes(orjson.dumps([{"targets": [controller]}]))
    labels = [{"agent": f"gate-{number}", "site": "berlin"} for number, _ in enumerate(agents)]
    entries = [{"targets": [agent], "labels": of_agent} for agent, of_agent in zip(agents, labels, strict=True)]
    (folder / "targets" / "agents.yml").write_bytes(orjson.dumps(entries))
    configuration = folder / "prometheus.yml"
    text = configuration.read_text()
    assert _INTERVAL in text
    configuration.write_text(text.replace(_INTERVAL, "interval: 1s"))
    return configuration


@contextmanager
def running_prometheus(folder: Path, *, secret: str, controller: str, agents: Sequence[str]) -> Iterator[Prometheus]:
    """Yield a Prometheus that scrapes once a second; it is gone afterwards."""
    configuration = configured(folder, secret=secret, controller=controller, agents=agents)
    port = free_port()
    log = folder / "prometheus.log"
    command = [
        program_path("prometheus"),
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        prometheus = Prometheus(port)
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not prometheus.is_ready():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < give_up_s, log.read_text()[-2000:]
            time.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
