"""The agents of `benchmarks.session`: some hundred to a process, each with its own key, connection and session.

    standard input ──one command a line──▶ swarm ──one JSON object a line──▶ standard output

They are as light as agents can be that still speak as real ones do: `Link` and `Session` are the agent's own, with its
keepalive, its deadlines and its pace of new attempts. What is left out is everything behind them: a push is not
verified, its metadata only counted as held, and every slot is reported ready at once.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from core.addresses import Address, parse_address
from core.clock import SystemClock
from core.digest import Digest
from core.fleet_state import (
    NOWHERE,
    AgentHello,
    CatalogueVersions,
    MetadataFile,
    PushResult,
    SignedAssignment,
    SlotPhase,
    SlotReport,
)
from core.fleet_wire import decode_desired
from core.grpc_transport import CHANNEL_OPTIONS, MUTUAL_TLS_OPTIONS, TlsIdentity
from core.ids import AgentId, SiteId
from core.samples import SampleOrder
from edge_agent.link.reconnect import Link, ReconnectPolicy
from edge_agent.link.session import FleetStub, Session, SessionLimits, SessionState
from edge_agent.reconcile.board import Board
from protos.fleet.v1 import fleet_pb2 as pb
from protos.fleet.v1.fleet_pb2_grpc import FleetServiceStub

# A channel of its own is a connection of its own; otherwise gRPC shares those of a process.
OPTIONS = [*CHANNEL_OPTIONS, *MUTUAL_TLS_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
# All at the same instant, which is harder than the second over which real agents spread.
PACE = ReconnectPolicy(first_delay_s=0.0)
TAGS = ("arch:x86_64", "os:linux", "runtime:onnxruntime-1")
WAIT_TIMEOUT_S = 120.0
_ROOT = re.compile(r"([0-9]+)\.root\.json")


class LightAgent:
    def __init__(self, identity: Mapping[str, str], trust_bundle: str, target: Address) -> None:
        self._id = AgentId(identity["agent_id"])
        self._site = SiteId(identity["site"])
        self._tls = TlsIdentity(identity["chain"].encode(), identity["key"].encode(), trust_bundle.encode())
        self._target = target
        self._catalogue = CatalogueVersions(1, 0)
        self._applied = NOWHERE
        self._running: asyncio.Task[None] | None = None
        self.board = Board(NOWHERE)
        self.opened = asyncio.Event()
        self.pushed = asyncio.Event()
        self.pushed_at_s = 0.0
        self.attempts = 0

    def dial(self) -> None:
        self._running = asyncio.create_task(self._run(), name=self._id)

    async def cut(self) -> None:
        """Drop the connection."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        self.opened.clear()
        self.attempts = 0

    async def push(self, signed: SignedAssignment) -> PushResult:
        self.pushed_at_s = time.monotonic()
        desired = decode_desired(pb.DesiredState.FromString(signed.payload))
        self.board.show(SlotReport(slot, SlotPhase.READY, 4096, 4096) for slot in desired.slots)
        self.board.apply(desired.position)
        self._applied = desired.position
        self._catalogue = _after(self._catalogue, signed.catalogue)
        self.pushed.set()
        return PushResult(desired.position)

    async def trust_bundle(self, pem: bytes) -> None:
        raise AssertionError("expected no other authorities in this benchmark")

    async def permit_transfer(self, manifest_digest: Digest) -> None:
        raise AssertionError("expected no permission in this benchmark")

    def order_samples(self, order: SampleOrder) -> None:
        raise AssertionError("expected no wish for samples in this benchmark")

    def retry_failed(self) -> None:
        """Nothing has failed."""

    async def _run(self) -> None:
        async with grpc.aio.secure_channel(
            str(self._target), self._tls.channel_credentials(), options=OPTIONS
        ) as channel:
            stub: Any = FleetServiceStub(channel)
            await Link(lambda on_state: self._session(stub, on_state), policy=PACE, clock=SystemClock()).run()

    def _session(self, stub: FleetStub, on_state: Callable[[SessionState], None]) -> Session:
        self.attempts += 1

        def note(state: SessionState) -> None:
            on_state(state)
            if state is SessionState.OPEN:
                self.opened.set()

        hello = AgentHello(
            self._id,
            self._site,
            "0.0",
            f"boot-{self._id}",
            self._applied,
            TAGS,
            self._catalogue,
            trust_bundle_sha256=hashlib.sha256(self._tls.trust_bundle).digest(),
        )
        return Session(stub, self, self, hello=hello, limits=SessionLimits(), on_state=note)


def _after(held: CatalogueVersions, files: tuple[MetadataFile, ...]) -> CatalogueVersions:
    """Return what an agent holds once it has verified `files`."""
    root, timestamp = held
    for file in files:
        if match := _ROOT.fullmatch(file.name):
            root = max(root, int(match[1]))
        elif file.name == "timestamp.json":
            timestamp = int(json.loads(file.content)["signed"]["version"])
    return CatalogueVersions(root, timestamp)


class Swarm:
    def __init__(self, agents: list[LightAgent]) -> None:
        self._agents = agents

    async def dial(self) -> dict[str, Any]:
        """Let all dial at once; answer at once."""
        for agent in self._agents:
            agent.dial()
        return {}

    async def opened(self) -> dict[str, Any]:
        """Answer when all have been welcomed, with the attempts that it took."""
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            for agent in self._agents:
                await agent.opened.wait()
        return {"attempts": sum(agent.attempts for agent in self._agents)}

    async def cut(self) -> dict[str, Any]:
        await asyncio.gather(*(agent.cut() for agent in self._agents))
        return {}

    async def arm(self) -> dict[str, Any]:
        """Forget the last push."""
        for agent in self._agents:
            agent.pushed.clear()
        return {}

    async def pushed(self) -> dict[str, Any]:
        """Answer when all have got a push since `arm`, with the instants."""
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            for agent in self._agents:
                await agent.pushed.wait()
        return {"pushed_at_s": [agent.pushed_at_s for agent in self._agents]}


async def obey(swarm: Swarm) -> None:
    """Do what standard input says, until it ends."""
    loop = asyncio.get_running_loop()
    commands = {"dial": swarm.dial, "opened": swarm.opened, "cut": swarm.cut, "arm": swarm.arm, "pushed": swarm.pushed}
    while word := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        print(json.dumps(await commands[word]()), flush=True)


async def run(known: Mapping[str, Any], target: Address) -> None:
    swarm = Swarm([LightAgent(identity, known["trust_bundle"], target) for identity in known["agents"]])
    print("{}", flush=True)
    try:
        await obey(swarm)
    finally:
        await swarm.cut()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path, help="identities, see `benchmarks.session`")
    parser.add_argument("target", type=parse_address, help="the controller's gRPC port")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    uvloop.run(run(json.loads(arguments.file.read_bytes()), arguments.target))


if __name__ == "__main__":
    main()
