"""One load generator for every server of the Open Inference Protocol: the same bytes to each, over HTTP or gRPC.

    python -m benchmarks.oip_load --http 127.0.0.1:8080 --model small --in-flight 8 --seconds 2

A closed loop: `--in-flight` requests are under way at any time, each on a connection of its own over HTTP. Bodies are
made once, answers are looked at for their status and length only, so that the server is what is measured.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, cast

import grpc
import grpc.aio
import numpy as np
import uvloop

from core.open_inference import binary_body, json_body, protobuf_body
from core.open_inference.messages import InferRequest
from core.tensors import Datatype, Tensor

INPUT = "x"
COLUMNS = 64
METHOD = "/inference.GRPCInferenceService/ModelInfer"
# Chosen: connections and code paths are warm behind it.
WARM_UP_S = 0.5

Ask = Callable[[], Awaitable[None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--http", metavar="HOST:PORT")
    where.add_argument("--grpc", metavar="HOST:PORT")
    parser.add_argument("--model", required=True)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--binary", action="store_true", help="over HTTP: raw tensors behind a JSON header")
    arguments = parser.parse_args()
    print(json.dumps(uvloop.run(load(arguments))))


async def load(arguments: argparse.Namespace) -> dict[str, float]:
    request = request_of(arguments.model)
    if arguments.grpc:
        body = protobuf_body.encode_request(request).SerializeToString()
        channel = grpc.aio.insecure_channel(arguments.grpc)
        call: Any = channel.unary_unary(METHOD)
        askers: Sequence[Ask] = [partial(_ask_grpc, call, body)] * arguments.in_flight
        times_s = await closed_loop(askers, arguments.seconds)
        await channel.close()
    else:
        message = http_message(request, arguments.http, is_binary=arguments.binary)
        connections = [await HttpClient.connect(arguments.http) for _ in range(arguments.in_flight)]
        times_s = await closed_loop([partial(each.ask, message) for each in connections], arguments.seconds)
        for connection in connections:
            connection.close()
    return figures(times_s, arguments.seconds)


def request_of(model: str) -> InferRequest:
    values = np.random.default_rng(1).random((1, COLUMNS), np.float32)
    return InferRequest(model, (Tensor(INPUT, Datatype.FP32, values),), id="1")


def http_message(request: InferRequest, host: str, *, is_binary: bool) -> bytes:
    """Return head and body of the request."""
    if is_binary:
        body, header_length = binary_body.encode_request(request)
        fields = f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {header_length}\r\n"
    else:
        body, fields = json_body.encode_request(request), "Content-Type: application/json\r\n"
    head = f"POST /v2/models/{request.model_name}/infer HTTP/1.1\r\nHost: {host}\r\n{fields}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def closed_loop(askers: Sequence[Ask], seconds: float) -> list[float]:
    """Return how long each request took that ended within the measured time."""
    times_s: list[float] = []
    begin_s = time.perf_counter() + WARM_UP_S
    end_s = begin_s + seconds

    async def keep_asking(ask: Ask) -> None:
        while (started_s := time.perf_counter()) < end_s:
            await ask()
            now_s = time.perf_counter()
            if begin_s <= now_s < end_s:
                times_s.append(now_s - started_s)

    await asyncio.gather(*(keep_asking(ask) for ask in askers))
    return times_s


def figures(times_s: Sequence[float], seconds: float) -> dict[str, float]:
    p50_s, p99_s = np.percentile(times_s, [50, 99])
    return {
        "rps": round(len(times_s) / seconds, 1),
        "p50_ms": round(float(p50_s) * 1e3, 4),
        "p99_ms": round(float(p99_s) * 1e3, 4),
    }


async def _ask_grpc(call: Any, body: bytes) -> None:
    answer = await call(body)
    if len(answer) < COLUMNS // 2:
        raise RuntimeError(f"expected an answer with scores, got {answer!r}")


class HttpClient(asyncio.Protocol):
    """One kept connection; the least that reads an answer with a Content-Length."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answered: asyncio.Future[None] | None = None

    @classmethod
    async def connect(cls, address: str) -> "HttpClient":
        host, _, port = address.rpartition(":")
        _, client = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return client

    async def ask(self, message: bytes) -> None:
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        await self._answered

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The transports of uvloop are none to isinstance.
        self._transport = transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0 or self._answered is None:
            return
        head = self._buffer[:head_end].lower()
        length_at = head.find(b"content-length:") + len(b"content-length:")
        length = int(head[length_at:].split(b"\r\n", 1)[0])
        if len(self._buffer) < head_end + 4 + length:
            return
        answered, self._answered = self._answered, None
        if head.startswith(b"http/1.1 200"):
            answered.set_result(None)
        else:
            answered.set_exception(RuntimeError(f"expected 200, got {self._buffer[:300]!r}"))
        self._buffer = b""

    def connection_lost(self, error: Exception | None) -> None:
        if self._answered is not None:
            self._answered.set_exception(ConnectionError("the server closed the connection"))


if __name__ == "__main__":
    main()
