"""What an idle agent and its controller say to each other: bytes on a link that somebody may pay for.

A real controller with a ready heavy tier, a broker, and a real agent that enrolled, fetched one model, verified and
activated it, was started again, and answered a device once, which asked for a trace: the connection for telemetry is
open too. Everything that the agent has to say goes to one address of the controller: the session, telemetry (OTLP) and
records. Here a relay stands at that address and counts what passes, whatever connection it is on; nothing needs root.
The agent keeps the defaults of every setting that is not about a place.

    idle_bytes_per_s        TCP payload of both directions: TLS, HTTP/2, keepalive and all
    idle_wire_bytes_per_s   with 52 bytes of IPv4 and TCP header for each segment, which TCP itself counts
    idle_passed             what it was: second, sender and bytes
    deployed_rss_mb         resident memory once the model has come and was asked, before the second start
    in_fleet_rss_mb         the same of the idle agent after its second start, at the end
"""

import asyncio
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.session import SITE, Operator, Wire
from controller.api import identity_views
from controller.cli.client import ControllerClient
from controller.cli.credential import read_credential
from core.addresses import Address, parse_address
from tests.support.controller_process import ControllerProcess
from tests.support.fake_heavy import FakeHeavy

# Derived: the outbox's first delivery comes within 30 s of the session's start, and what became of it is in the vitals
# 15 s later at the most.
SETTLE_S = 45.0
ENROL_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 16
# Chosen: enough to tell what repeats; an idle link has fewer.
MAX_SHOWN = 40
MIB = 1 << 20

# Given the state folder of an enrolled agent and the address of its controller.
RunningAgent = Callable[[Path, Address], AbstractContextManager["subprocess.Popen[bytes]"]]


async def measure_idle(
    folder: Path, command: Path, running: RunningAgent, *, agent_id: str, ask_once: Callable[[], None], idle_s: float
) -> dict[str, Any]:
    """Let an agent join a fleet, answer once and settle; then count for `idle_s`.

    `command` is the agent's, with which it enrols; `ask_once` returns once the agent has answered a device.
    """
    async with FakeHeavy() as heavy:
        with ControllerProcess(folder / "controller", NANOFLEET_HEAVY__URL=heavy.url) as controller:
            endpoints = await asyncio.to_thread(controller.endpoints)
            state_dir = folder / "state"
            async with CountingRelay(parse_address(endpoints["controller_grpc"])) as relay:
                with open_client(controller) as client:
                    await asyncio.to_thread(enrol, command, client, state_dir, agent_id)
                    with running(state_dir, relay.address) as process:
                        await asyncio.to_thread(deploy, client, folder)
                        await asyncio.to_thread(ask_once)
                        deployed_rss_mb = rss_mb(process)
                    with running(state_dir, relay.address) as process:
                        await asyncio.to_thread(ask_once)
                        await asyncio.sleep(SETTLE_S)
                        figures = await count(relay, process, idle_s)
                        return figures | {"deployed_rss_mb": deployed_rss_mb, "in_fleet_rss_mb": rss_mb(process)}


async def count(relay: "CountingRelay", process: "subprocess.Popen[bytes]", idle_s: float) -> dict[str, Any]:
    began_s, connections = time.monotonic(), relay.connections
    wire = await asyncio.to_thread(Wire.of, str(relay.address))
    await asyncio.sleep(idle_s)
    passed = relay.since(began_s)
    segments = (await asyncio.to_thread(Wire.of, str(relay.address))).since(
        wire, expected_connections=relay.connections
    )
    payload_bytes = sum(each.size_bytes for each in passed)
    return {
        "idle_bytes_per_s": round(payload_bytes / idle_s, 2),
        "idle_wire_bytes_per_s": round(segments.size_bytes / idle_s, 2),
        "idle_seconds": idle_s,
        "idle_connections": connections,
        "idle_passed": [[round(each.at_s - began_s, 1), each.sender, each.size_bytes] for each in passed[:MAX_SHOWN]],
    }


def rss_mb(process: "subprocess.Popen[bytes]") -> float:
    return round(psutil.Process(process.pid).memory_info().rss / MIB, 3)


def open_client(controller: ControllerProcess) -> ControllerClient:
    url = controller.endpoints()["controller_http"]
    return ControllerClient(url, credential_file=read_credential(controller.credential()))


def enrol(command: Path, client: ControllerClient, state_dir: Path, agent_id: str) -> None:
    token = client.create_token(identity_views.TokenBody(site=SITE)).text
    words: list[str | Path] = [command, "enrol", "-", "--state-dir", state_dir, "--name", agent_id]
    subprocess.run(words, input=token, text=True, check=True, capture_output=True, timeout=ENROL_TIMEOUT_S)


def deploy(client: ControllerClient, folder: Path) -> None:
    operator = Operator(client)
    operator.publish(folder)
    operator.deploy_the_other()
    operator.wait_until_in_sync(1)


@dataclass(frozen=True, slots=True)
class Passed:
    """Bytes that came in one piece from the `sender`."""

    at_s: float
    sender: str
    size_bytes: int


class CountingRelay:
    """Use as an async context manager; hands every connection on to `target`, and notes what passes."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self._passed: list[Passed] = []
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    @property
    def address(self) -> Address:
        assert self._server is not None
        return Address(*self._server.sockets[0].getsockname()[:2])

    @property
    def connections(self) -> int:
        return len(self._open)

    def since(self, at_s: float) -> Sequence[Passed]:
        return [passed for passed in self._passed if passed.at_s >= at_s]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="relayed connection")
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on_reader, on_writer = await asyncio.open_connection(self._target.host, self._target.port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pass_on(reader, on_writer, "agent"), name="relay to controller")
            tasks.create_task(self._pass_on(on_reader, writer, "controller"), name="relay to agent")

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sender: str) -> None:
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                self._passed.append(Passed(time.monotonic(), sender, len(chunk)))
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            # Whoever breaks a connection ends it for the other too, which is all that there is to know.
            return
        finally:
            writer.close()
