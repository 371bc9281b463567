"""What two thousand agents cost a controller that they only stay connected to, and how fast it reaches them all.

    python -m benchmarks.session --json

The controller is the real process on a data folder of its own: agents are enrolled, a model of two variants is
published and signed, everything travels over mutual TLS on loopback, one connection per agent. The agents are light
ones in two processes, see `benchmarks.session_swarm`; they share the machine's cores with the controller.

    idle_bytes_per_s   per agent, both directions, while nobody says anything: TCP's own counters of every connection
                       (keepalive of both sides), and 52 bytes of IPv4 and TCP header for each segment
    kb_per_agent       resident memory of the controller, all connected minus none ever connected; `…_in_sync`:
                       after a first deployment to all of them as well, the memory of which the allocator keeps
    storm_s            all dial at the same instant while a new deployment waits for them: from there until the
                       controller shows all of them in sync; streams that fail to start are tried again
    push_p99_s         from the operator's HTTP call until an agent has its signed assignment
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Self

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from controller import foundation
from controller.access.model import OperatorRole
from controller.api import operator_views as views
from controller.cli.client import ControllerClient
from controller.cli.credential import Credential, CredentialFile
from controller.demo.processes import Part, Parts
from controller.demo.stack import answers_ok, free_address, write_toml
from controller.identity.authority import key_pem, new_key
from controller.identity.service import Identity
from controller.settings import Settings, load_settings
from core.clock import SystemClock
from core.digest import digest_of_file
from core.ids import SiteId
from tests.support.edge_models import make_mlp

SWARMS = 2
SITE, MODEL = "bench", "small"
VARIANTS = ("original", "int8-dynamic")
# A common multiple of both sides' keepalive (60 and 90 s), so that every ping is counted for its whole share.
IDLE_S = 180.0
SETTLE_S = 5.0
START_TIMEOUT_S = 60.0
SYNC_TIMEOUT_S = 120.0
ENROLMENTS_PER_TOKEN = 1000
# Derived: IPv4 20 bytes, TCP 20 bytes and its timestamps 12.
HEADER_BYTES = 52


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--agents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5, help="deployments pushed, and storms")
    parser.add_argument("--idle-s", type=float, default=IDLE_S)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
        figures = measure(Path(folder), arguments.agents, rounds=arguments.rounds, idle_s=arguments.idle_s)
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def measure(folder: Path, count: int, *, rounds: int, idle_s: float) -> dict[str, Any]:
    config = write_configuration(folder)
    settings = load_settings(config)
    credential = asyncio.run(prepare(folder, settings, count))
    with Parts(folder / "logs") as parts:
        part = parts.start_python("controller", "controller.cli.app", "controller", "run", "--config", str(config))
        url = f"http://{settings.http_bind}"
        part.wait_for("a live controller", lambda: answers_ok(f"{url}/v2/health/live"), timeout_s=START_TIMEOUT_S)
        with ControllerClient(url, credential_file=CredentialFile(folder, credential)) as client:
            operator = Operator(client)
            operator.publish(folder)
            with swarm(folder, settings.grpc_bind) as agents:
                figures = measure_idle(part, operator, agents, settings, count=count, idle_s=idle_s)
                figures |= measure_pushes(operator, agents, rounds=rounds)
                figures |= measure_storms(operator, agents, count=count, rounds=rounds)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "load": os.getloadavg()[1]}
    return {"benchmark": "session", **machine, "agents": count, "rounds": rounds, **figures}


# What is measured


def measure_idle(
    part: Part, operator: "Operator", agents: "Agents", settings: Settings, *, count: int, idle_s: float
) -> dict[str, Any]:
    """Connect everybody, deploy once, then keep silent."""
    time.sleep(SETTLE_S)
    before_bytes = resident_bytes(part)
    agents.tell("dial")
    attempts = sum(answer["attempts"] for answer in agents.ask("opened"))
    time.sleep(SETTLE_S)
    connected_bytes = resident_bytes(part)
    push(operator, agents)
    operator.wait_until_in_sync(count)
    time.sleep(SETTLE_S)
    wire_before = Wire.of(settings.grpc_bind)
    time.sleep(idle_s)
    wire = Wire.of(settings.grpc_bind).since(wire_before, expected_connections=count)
    return {
        "first_attempts": attempts,
        "idle_s": idle_s,
        "idle_bytes_per_s": round(wire.size_bytes / idle_s / count, 2),
        "idle_tls_bytes_per_s": round(wire.payload_bytes / idle_s / count, 2),
        "controller_mb_before": round(before_bytes / 1e6, 1),
        "kb_per_agent": round((connected_bytes - before_bytes) / 1000 / count, 1),
        "kb_per_agent_in_sync": round((resident_bytes(part) - before_bytes) / 1000 / count, 1),
    }


def measure_pushes(operator: "Operator", agents: "Agents", *, rounds: int) -> dict[str, Any]:
    delays = [push(operator, agents) for _ in range(rounds)]
    return {
        "push_p50_s": round(median(median(each) for each in delays), 3),
        "push_p99_s": round(median(quantiles(each, n=100)[98] for each in delays), 3),
        "push_p99_s_rounds": [round(quantiles(each, n=100)[98], 3) for each in delays],
        "push_last_s": round(max(max(each) for each in delays), 3),
    }


def measure_storms(operator: "Operator", agents: "Agents", *, count: int, rounds: int) -> dict[str, Any]:
    storms_s, attempts = [], 0
    for _ in range(rounds):
        agents.ask("cut")
        time.sleep(SETTLE_S)
        agents.ask("arm")
        operator.deploy_the_other()
        started_s = time.monotonic()
        agents.tell("dial")
        agents.ask("pushed")
        operator.wait_until_in_sync(count)
        storms_s.append(time.monotonic() - started_s)
        attempts += sum(answer["attempts"] for answer in agents.ask("opened"))
    return {
        "storm_s": round(median(storms_s), 2),
        "storm_s_rounds": [round(storm_s, 2) for storm_s in storms_s],
        "storm_retries_per_agent": round(attempts / count / rounds - 1, 4),
    }


def push(operator: "Operator", agents: "Agents") -> list[float]:
    """Deploy; return the seconds after which each agent had its assignment."""
    agents.ask("arm")
    started_s = time.monotonic()
    operator.deploy_the_other()
    return [at_s - started_s for answer in agents.ask("pushed") for at_s in answer["pushed_at_s"]]


def resident_bytes(part: Part) -> int:
    return int(psutil.Process(part.process.pid).memory_info().rss)


class Wire:
    """What the kernel has counted on the agents' ends of all connections to one port."""

    def __init__(self, connections: int, payload_bytes: int, segments: int) -> None:
        self.connections = connections
        self.payload_bytes = payload_bytes
        self.segments = segments

    @classmethod
    def of(cls, address: str) -> Self:
        port = address.rpartition(":")[2]
        command = ["ss", "-tinHO", "state", "established", f"dport = :{port}"]
        lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
        payload = sum(int(number) for number in re.findall(r"\bbytes_(?:sent|received):([0-9]+)", "\n".join(lines)))
        segments = sum(int(number) for number in re.findall(r"\bsegs_(?:in|out):([0-9]+)", "\n".join(lines)))
        return cls(len(lines), payload, segments)

    @property
    def size_bytes(self) -> int:
        return self.payload_bytes + HEADER_BYTES * self.segments

    def since(self, before: Self, *, expected_connections: int) -> "Wire":
        if not self.connections == before.connections == expected_connections:
            raise RuntimeError(
                f"expected {expected_connections} connections, got {before.connections}, {self.connections}"
            )
        return Wire(self.connections, self.payload_bytes - before.payload_bytes, self.segments - before.segments)


# The operator


class Operator:
    def __init__(self, client: ControllerClient) -> None:
        self._client = client
        self._next = itertools.cycle(VARIANTS)

    def publish(self, folder: Path) -> None:
        built = make_mlp(folder / "model", name=MODEL)
        file = built.folder / built.manifest.entry
        digest = digest_of_file(file)
        self._client.put_blob(digest, file, on_sent=lambda _: None)
        body = views.PublishBody(file=views.FileBody(path="model.onnx", digest=digest), recipes=VARIANTS[1:])
        publication = self._client.publish(MODEL, body)
        while publication.state == "running":
            publication = self._client.publication(publication.id, seen_at=publication.updated_at)
        if publication.state == "failed":
            raise RuntimeError(f"publishing failed: {publication.problem}")

    def deploy_the_other(self) -> None:
        """Let everybody run the variant that they do not run now."""
        self._client.deploy(views.DeploymentBody(target_kind="fleet", model=MODEL, variant=next(self._next)))

    def wait_until_in_sync(self, count: int) -> None:
        give_up_s = time.monotonic() + SYNC_TIMEOUT_S
        while sum(agent.is_in_sync and agent.is_online for agent in self._client.agents().agents) < count:
            if time.monotonic() > give_up_s:
                raise TimeoutError(f"expected all in sync within {SYNC_TIMEOUT_S:g} s")
            time.sleep(0.1)


# The agents


class Agents:
    """All swarms; each does the same at the same time."""

    def __init__(self, processes: Sequence["subprocess.Popen[str]"]) -> None:
        self._processes = processes

    def tell(self, word: str) -> None:
        """Give a command whose answer has no meaning, and do not wait until it is done."""
        self._write(word)
        self.answers()

    def ask(self, word: str) -> list[dict[str, Any]]:
        self._write(word)
        return self.answers()

    def answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"expected an answer, the agents ended with exit code {process.wait()}")
            answers.append(json.loads(line))
        return answers

    def _write(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{word}\n")
            process.stdin.flush()


@contextmanager
def swarm(folder: Path, target: str) -> Iterator[Agents]:
    command = [sys.executable, "-m", "benchmarks.session_swarm"]
    processes = [
        subprocess.Popen(
            [*command, str(identities_file(folder, number)), target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(SWARMS)
    ]
    try:
        agents = Agents(processes)
        # Each says when it has read its keys.
        agents.answers()
        yield agents
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def identities_file(folder: Path, number: int) -> Path:
    return folder / f"swarm-{number}.json"


# The controller


def write_configuration(folder: Path) -> Path:
    places = {name: str(free_address()) for name in ("grpc_bind", "enrolment_bind", "http_bind")}
    # Nobody listens there: this is about agents.
    nowhere = f"http://{free_address()}"
    top = {"data_dir": str(folder / "data"), **places}
    return write_toml(folder / "controller.toml", top, heavy={"mode": "url", "url": nowhere})


async def prepare(folder: Path, settings: Settings, count: int) -> Credential:
    """Make the fleet's authority, enrol everybody, and return the operator's credential."""
    async with AsyncExitStack() as stack:
        laid = await foundation.lay(settings, stack, clock=SystemClock())
        enrolled = await enrol(laid.identity, count)
        bundle = laid.identity.trust_bundle().decode()
        for number in range(SWARMS):
            known = {"trust_bundle": bundle, "agents": enrolled[number::SWARMS]}
            identities_file(folder, number).write_text(json.dumps(known))
        issued = await laid.access.create("bench", OperatorRole.ADMIN)
        return Credential(controller=f"http://{settings.http_bind}", name="bench", secret=issued.secret)


async def enrol(identity: Identity, count: int) -> list[dict[str, str]]:
    enrolled = []
    for number in range(count):
        if number % ENROLMENTS_PER_TOKEN == 0:
            uses = min(ENROLMENTS_PER_TOKEN, count - number)
            token = await identity.create_token(
                SiteId(SITE), created_by="bench", uses=uses, lifetime=timedelta(hours=1)
            )
        key = new_key()
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        der = csr.public_bytes(serialization.Encoding.DER)
        credential = await identity.enrol(token.secret, der, f"agent-{number:05}")
        enrolled.append(
            {
                "agent_id": credential.identity.agent,
                "site": credential.identity.site,
                "key": key_pem(key).decode(),
                "chain": credential.certificate_chain.decode(),
            }
        )
    return enrolled


if __name__ == "__main__":
    main()
