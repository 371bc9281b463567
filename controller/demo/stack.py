"""Start the parts that an operator would start: a controller with its local Ray, and agents.

Where a part listens is decided before it starts, so that it can be started again in the same place.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from controller.demo.broker import Broker, accepts
from controller.demo.ports import free_port
from controller.demo.processes import Part, Parts
from core.addresses import Address

START_TIMEOUT_S = 30.0
# A local Ray starts in about ten seconds on two idle cores; a first start after installation takes several times that.
HEAVY_START_TIMEOUT_S = 120.0
# Faces that are asked before they are up refuse the connection or answer late.
PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Controller:
    folder: Path
    grpc: Address
    enrolment: Address
    http: Address
    heavy_http: Address

    @classmethod
    def planned(cls, folder: Path) -> Self:
        """Choose free ports; nothing runs yet."""
        return cls(folder, free_address(), free_address(), free_address(), free_address())

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    @property
    def credential(self) -> Path:
        """The admin's, made by `initialise`."""
        return self.folder / "admin.json"

    @property
    def configuration(self) -> Path:
        return self.folder / "controller.toml"

    def initialise(self, parts: Parts) -> None:
        """Make the fleet's authority, its catalogue and the first admin."""
        top = {
            "data_dir": str(self.folder),
            "grpc_bind": str(self.grpc),
            "enrolment_bind": str(self.enrolment),
            "http_bind": str(self.http),
        }
        write_toml(self.configuration, top, heavy={"port": self.heavy_http.port, "max_replicas": 1})
        words = ["--config", str(self.configuration), "--credential", str(self.credential)]
        part = parts.start_python("controller-init", "controller.cli.app", "controller", "init", *words)
        part.finish(timeout_s=START_TIMEOUT_S)

    def start(self, parts: Parts) -> Part:
        """Start the process and wait until it answers; its heavy tier is still starting then."""
        words = ["controller", "run", "--config", str(self.configuration)]
        part = parts.start_python("controller", "controller.cli.app", *words)
        health = f"{self.url}/v2/health/live"
        part.wait_for("a live controller", lambda: answers_ok(health), timeout_s=START_TIMEOUT_S)
        return part

    def wait_for_heavy(self, part: Part) -> None:
        """Wait until the gateway says that the heavy tier is ready."""
        health = f"{self.url}/v2/health/ready"
        part.wait_for("a ready heavy tier", lambda: answers_ok(health), timeout_s=HEAVY_START_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Agent:
    folder: Path
    agent_id: str
    site: str
    grpc: Address

    @classmethod
    def planned(cls, folder: Path, *, agent_id: str, site: str) -> Self:
        """Choose a free port; nothing runs yet."""
        return cls(folder, agent_id, site, grpc=free_address())

    def enrol(self, parts: Parts, *, token: str) -> None:
        """Let it into the fleet."""
        words = ["enrol", token, "--state-dir", str(self.folder)]
        part = parts.start_python(f"{self.agent_id}-enrol", "edge_agent", *words)
        part.finish(timeout_s=START_TIMEOUT_S)

    def start(self, parts: Parts, *, broker: Broker) -> Part:
        """Start the process and wait until its local face is up; it was enrolled before."""
        top = {"state_dir": str(self.folder), "grpc_bind": str(self.grpc)}
        mqtt = {"host": broker.address.host, "port": broker.address.port, "protocol": 5 if broker.speaks_v5 else 4}
        link = {"first_delay_s": 0.0, "reconnect_cap_s": 2.0}
        configuration = write_toml(self.folder / "agent.toml", top, mqtt=mqtt, link=link)
        part = parts.start_python(self.agent_id, "edge_agent", "run", "--config", str(configuration))
        part.wait_for("its local face", lambda: accepts(self.grpc), timeout_s=START_TIMEOUT_S)
        return part


def free_address() -> Address:
    return Address("127.0.0.1", free_port())


def write_toml(path: Path, top: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """Write flat settings; every value is text, a number or a truth value, which JSON and TOML spell alike."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for section, values in sections.items():
        lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def answers_ok(url: str) -> bool | None:
    try:
        return httpx.get(url, timeout=PROBE_TIMEOUT_S).is_success or None
    except httpx.TransportError:
        return None
