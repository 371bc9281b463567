"""Delivery of a variant to disk, verified and durable, against a bare stream of as many bytes.

    python -m benchmarks.fetch --json

One server process holds both: DeliveryService as the controller runs it (fair sending, admission, chunks read from the
blob store, nobody's packs: every chunk goes as it is), and a method that reads the same file and sends it, 1 MiB at a
time. Both are behind the same mutual TLS, made here, on the same port, and are asked over the same channel settings:

    bare     grpc.aio ──TLS──▶ count the bytes
    plain    grpc.aio ──TLS──▶ hash ─▶ write ─▶ fsync
    ours     grpc.aio ──TLS──▶ Delivery ─▶ hash every chunk ─▶ write ─▶ fsync ─▶ rename ─▶ fsync

`throughput_ratio`: the median over rounds of ours / bare, who goes first in turns. `plain` is the bare stream again, as
ten lines of Python verify it and make it durable, with nothing around them: `plain_ratio` is plain / bare, and
`ratio_to_plain` ours / plain. `slowest_over_fastest`: the longest over the shortest time of 50 agents, each with a
certificate, a connection and a store of its own, that start at once.
`resume_refetched_chunks`: the most chunks that were asked for again, after they had arrived, when the agent process was
killed (SIGKILL) at an instant of no meaning and started again; several times.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import grpc.aio
import numpy as np
import uvloop

from controller.api.delivery_grpc import DeliveryServicer, add_delivery_to_server
from controller.transfer.fairness import Admission, FairSender, SendLimits
from controller.transfer.model import Encoded, Sizes
from controller.transfer.service import Transfers
from core.addresses import Address
from core.atomic_files import write_atomically
from core.chunks import ChunkRef, chunk_digest, chunk_of
from core.clock import SystemClock
from core.digest import Digest, digest_of, hex_of
from core.errors import Unavailable
from core.grpc_transport import SERVER_OPTIONS, open_channel
from core.ids import AgentId
from core.manifest import MAX_CHUNK_BYTES, File, Lineage, Manifest, Signature
from core.spiffe import Role, parse_spiffe
from core.tensors import Datatype
from core.tls_files import read_tls_identity, write_tls_identity
from edge_agent.sync.calls import DeliveryCallsOverGrpc
from edge_agent.sync.controller_source import ControllerSource, SourceLimits
from edge_agent.sync.delivery import Delivery, DeliveryLimits
from edge_agent.sync.source import Arrived, ChunkSource
from edge_agent.sync.store import ContentStore
from tests.support.certified import FleetAuthority

AGENTS = 50
LARGE_BYTES = 256 << 20
# Large enough that the seconds of sending hide the tenths that fifty agents of one process take to begin.
SMALL_BYTES = 32 << 20
KILLS = 5
PAUSE_S = 0.5
BARE_METHOD = "/nanofleet.benchmarks.Bare/Stream"
START_TIMEOUT_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fetch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve(arguments.serve))
    elif arguments.fetch:
        uvloop.run(fetch_and_tell(arguments.fetch, arguments.port))
    else:
        with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
            figures = measure_all(Path(folder), rounds=arguments.rounds)
        print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def measure_all(folder: Path, *, rounds: int) -> dict[str, Any]:
    make_identities(folder)
    put_variant(folder, "large", LARGE_BYTES)
    put_variant(folder, "small", SMALL_BYTES)
    with server(folder) as port:
        figures = uvloop.run(measure_throughput(folder, port, rounds=rounds))
        figures |= uvloop.run(measure_fairness(folder, port))
        figures |= uvloop.run(measure_resume(folder, port))
    return {"benchmark": "fetch", "python": platform.python_version(), "cpus": os.cpu_count(), **figures}


# What is measured


async def measure_throughput(folder: Path, port: int, *, rounds: int) -> dict[str, Any]:
    variant = digest_in(folder, "large")
    bare_s: list[float] = []
    plain_s: list[float] = []
    ours_s: list[float] = []
    async with channel_of(folder, 0, port) as channel:
        for number in range(rounds + 1):
            store = folder / f"store-{number}"
            ways = [
                (bare_s, bare_stream(channel, LARGE_BYTES)),
                (plain_s, verified_stream(channel, LARGE_BYTES, folder / "plain")),
                (ours_s, deliver(channel, store, variant)),
            ]
            for times, way in ways if number % 2 else reversed(ways):
                # What the kernel still writes out or frees of the way before is not this one's.
                await asyncio.sleep(PAUSE_S)
                started_s = time.perf_counter()
                await way
                times.append(time.perf_counter() - started_s)
            shutil.rmtree(store)
            (folder / "plain").unlink()
    # The first round only warms up.
    for times in (bare_s, plain_s, ours_s):
        del times[0]
    ratios = quotients(bare_s, ours_s)
    size_mb = LARGE_BYTES / 1e6
    return {
        "rounds": rounds,
        "size_mb": round(size_mb, 1),
        "bare_mb_per_s": round(size_mb / median(bare_s), 1),
        "plain_mb_per_s": round(size_mb / median(plain_s), 1),
        "ours_mb_per_s": round(size_mb / median(ours_s), 1),
        "throughput_ratio": round(median(ratios), 3),
        "throughput_ratios": [round(ratio, 3) for ratio in ratios],
        "plain_ratio": round(median(quotients(bare_s, plain_s)), 3),
        "ratio_to_plain": round(median(quotients(plain_s, ours_s)), 3),
    }


def quotients(dividends: Sequence[float], divisors: Sequence[float]) -> list[float]:
    return [dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)]


async def measure_fairness(folder: Path, port: int) -> dict[str, Any]:
    variant = digest_in(folder, "small")
    start = asyncio.Event()

    async def one(number: int) -> float:
        async with channel_of(folder, number, port) as channel:
            await channel.channel_ready()
            await start.wait()
            started_s = time.perf_counter()
            await deliver(channel, folder / f"store-of-{number}", variant)
            return time.perf_counter() - started_s

    tasks = [asyncio.create_task(one(number), name=f"agent {number}") for number in range(AGENTS)]
    await asyncio.sleep(3.0)
    start.set()
    times_s = await asyncio.gather(*tasks)
    return {
        "agents": AGENTS,
        "agents_fastest_s": round(min(times_s), 3),
        "agents_slowest_s": round(max(times_s), 3),
        "agents_mb_per_s": round(AGENTS * SMALL_BYTES / 1e6 / max(times_s), 1),
        "slowest_over_fastest": round(max(times_s) / min(times_s), 3),
    }


async def measure_resume(folder: Path, port: int) -> dict[str, Any]:
    refetched: list[int] = []
    for number in range(KILLS):
        store = folder / f"killed-{number}"
        arrived = await kill_in_flight(folder, store, port, after_chunks=30 + 37 * number)
        async with channel_of(folder, 0, port) as channel:
            asked = await deliver(channel, store, digest_in(folder, "large"))
        refetched.append(len(arrived & asked))
        shutil.rmtree(store)
    return {"kills": KILLS, "resume_refetched_chunks": max(refetched)}


async def bare_stream(channel: grpc.aio.Channel, size_bytes: int) -> None:
    received = 0
    stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(BARE_METHOD)
    call = stream(b"")
    async for block in call:
        received += len(block)
    assert received == size_bytes, f"expected {size_bytes} bytes, got {received}"


async def verified_stream(channel: grpc.aio.Channel, size_bytes: int, path: Path) -> None:
    """Receive the bare stream, hash each block of it, write it where it belongs and make the file durable."""
    received = 0
    stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(BARE_METHOD)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, size_bytes)
    async for block in stream(b""):
        chunk_digest(block)
        os.pwrite(descriptor, block, received)
        os.posix_fadvise(descriptor, received, len(block), os.POSIX_FADV_DONTNEED)
        received += len(block)
    os.fsync(descriptor)
    os.close(descriptor)
    assert received == size_bytes, f"expected {size_bytes} bytes, got {received}"


async def deliver(channel: grpc.aio.Channel, root: Path, variant: Digest) -> set[int]:
    """Bring the variant into a store at `root`; return the chunks that were asked for."""
    source = Watched(controller_source(channel))
    await bring(source, root, variant)
    return source.asked


async def bring(source: ChunkSource, root: Path, variant: Digest) -> None:
    with ThreadPoolExecutor(1) as disk:
        limits = DeliveryLimits(reserve_bytes=0)
        store = ContentStore(root)
        delivery = Delivery(source, store, disk=disk, limits=limits, clock=SystemClock())
        await delivery.variant(variant, lambda *_: None)


def controller_source(channel: grpc.aio.Channel) -> ControllerSource:
    return ControllerSource(DeliveryCallsOverGrpc(channel), limits=SourceLimits(60.0), clock=SystemClock())


class Watched:
    """A source that remembers what was asked for, and tells the standard output of what arrived when it is asked to."""

    def __init__(self, source: ControllerSource, *, is_telling: bool = False) -> None:
        self.asked: set[int] = set()
        self._source = source
        self._is_telling = is_telling

    async def manifest(self, digest: Digest) -> bytes:
        return await self._source.manifest(digest)

    async def chunks(
        self, manifest_digest: Digest, wanted: Sequence[ChunkRef], *, held: Sequence[Digest], is_delta_only: bool
    ) -> AsyncGenerator[Arrived, None]:
        self.asked |= {ref.index for ref in wanted}
        chunks = self._source.chunks(manifest_digest, wanted, held=held, is_delta_only=is_delta_only)
        async with aclosing(chunks):
            async for arrived in chunks:
                if self._is_telling:
                    os.write(1, f"{arrived.ref.index}\n".encode())
                yield arrived


async def fetch_and_tell(root: Path, port: int) -> None:
    """Be the agent that is killed: tell of every chunk the moment it has arrived."""
    async with channel_of(root.parent, 0, port) as channel:
        source = Watched(controller_source(channel), is_telling=True)
        await bring(source, root, digest_in(root.parent, "large"))


async def kill_in_flight(folder: Path, store: Path, port: int, *, after_chunks: int) -> set[int]:
    """Return the chunks that had arrived when the agent was killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.fetch", "--fetch", str(store), "--port", str(port)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    arrived: set[int] = set()
    while len(arrived) < after_chunks:
        arrived.add(int(await process.stdout.readline()))
    process.kill()
    rest = await process.stdout.read()
    await process.wait()
    return arrived | {int(line) for line in rest.splitlines()}


# The server


class EveryVariant:
    """Wants everything for every agent."""

    def __init__(self, variants: Collection[Digest]) -> None:
        self._variants = variants

    async def wanted_by(self, agent_id: AgentId) -> Collection[Digest]:
        return self._variants

    async def entitled_to(self, agent_id: AgentId) -> Collection[Digest]:
        return self._variants


class Blobs:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, digest: Digest) -> Path:
        return self._folder / hex_of(digest)


class NoPacks:
    """Nothing is prepared, so chunks go as they are."""

    async def prepare(self, to: Manifest, held: Collection[Manifest]) -> None:
        raise Unavailable("no packs in this benchmark")

    async def encoded(self, to: Digest, index: int, held: Sequence[Digest]) -> Encoded:
        raise Unavailable("no packs in this benchmark")

    async def sizes(self, to: Digest, held: Sequence[Digest]) -> Sizes:
        raise Unavailable("no packs in this benchmark")


async def serve(folder: Path) -> None:
    clock = SystemClock()
    with ThreadPoolExecutor(4) as disk:
        transfers = Transfers(
            EveryVariant([digest_in(folder, name) for name in ("large", "small")]),
            Blobs(folder / "blobs"),
            NoPacks(),
            sender=FairSender(SendLimits(), clock=clock),
            admission=Admission(clock=clock),
            disk=disk,
            clock=clock,
        )
        preparing = asyncio.create_task(transfers.run(), name="preparations")
        server = grpc.aio.server(options=SERVER_OPTIONS)
        add_delivery_to_server(DeliveryServicer(transfers, caller_of=caller_of), server)
        server.add_generic_rpc_handlers((Bare(largest(folder / "blobs")),))
        port = server.add_secure_port("127.0.0.1:0", server_credentials(folder))
        await server.start()
        write_atomically(folder / "port", str(port).encode())
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        preparing.cancel()
        await server.stop(None)


class Bare(grpc.GenericRpcHandler):
    """The peer: the shortest way to send a file that grpc.aio offers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        is_ours = handler_call_details.method == BARE_METHOD
        return grpc.unary_stream_rpc_method_handler(self._stream) if is_ours else None

    async def _stream(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        with self._path.open("rb", buffering=0) as file:
            while block := file.read(MAX_CHUNK_BYTES):
                yield block


def caller_of(context: "grpc.aio.ServicerContext[Any, Any]") -> Callable[[], AgentId]:
    (uri,) = context.auth_context()["peer_spiffe_id"]
    agent_id = AgentId(parse_spiffe(uri.decode()).name)
    return lambda: agent_id


@contextmanager
def server(folder: Path) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.fetch", "--serve", str(folder)])
    try:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not (folder / "port").exists():
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield int((folder / "port").read_text())
    finally:
        process.terminate()
        process.wait()


# What it works on


def put_variant(folder: Path, name: str, size_bytes: int) -> None:
    """Put a variant of one file of int8 weights, as they are after quantization: normal, and so hard to compress."""
    generator = np.random.default_rng(1)
    pieces = [
        generator.normal(0, 28, MAX_CHUNK_BYTES).clip(-128, 127).astype(np.int8).tobytes()
        for _ in range(size_bytes // MAX_CHUNK_BYTES)
    ]
    weights = b"".join(pieces)
    chunks = tuple(chunk_of(piece) for piece in pieces)
    file = File(path="model.onnx", digest=digest_of(weights), size_bytes=size_bytes, chunks=chunks)
    tensor = (Signature(name="x", datatype=Datatype.FP32, shape=(-1, 8)),)
    manifest = Manifest(
        model=name,
        version=1,
        variant="int8",
        entry=file.path,
        files=(file,),
        inputs=tensor,
        outputs=tensor,
        lineage=Lineage(recipe="original"),
    )
    for content in (weights, manifest.to_bytes()):
        write_atomically(folder / "blobs" / hex_of(digest_of(content)), content)
    write_atomically(folder / name, manifest.digest().encode())


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def digest_in(folder: Path, name: str) -> Digest:
    return Digest((folder / name).read_text())


# Identities


def make_identities(folder: Path) -> None:
    authority = FleetAuthority()
    write_tls_identity(folder / "controller", authority.identity(Role.CONTROLLER))
    for number in range(AGENTS):
        name = f"agent-{number}"
        write_tls_identity(folder / name, authority.identity(Role.AGENT, name=name))


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    shown = read_tls_identity(folder / "controller")
    pair = shown.private_key, shown.certificate_chain
    return grpc.ssl_server_credentials([pair], shown.trust_bundle, require_client_auth=True)


def channel_of(folder: Path, number: int, port: int) -> grpc.aio.Channel:
    return open_channel(Address("127.0.0.1", port), read_tls_identity(folder / f"agent-{number}"))


if __name__ == "__main__":
    main()
