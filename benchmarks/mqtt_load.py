"""The load generator of `hot_path`: one MQTT 5 device that keeps a number of requests in flight.

    python -m benchmarks.mqtt_load --port 1883 --topic nf/v1/s/infer/a/m --in-flight 64 --qos 1 --seconds 3

Its packets are prepared beforehand, so that it takes a small part of a core. Prints one JSON object: `rps`, `p50_ms`,
`p99_ms`, `replies`.
"""

import argparse
import json
import math
import secrets
import struct
import time
from statistics import quantiles

from benchmarks.raw_mqtt import PUBLISH, RawClient, acknowledgement, sized
from edge_agent.front.mqtt.publication import decode_publication, encode_words, with_length

FEATURES = 64
SITE = "bench"
CLIENT = "load"
REPLIES = f"nf/v1/{SITE}/clients/{CLIENT}/replies"
DEADLINE_MS = 10_000
WARM_UP_S = 0.5
# As long as the correlation data that take its place.
PLACEHOLDER = b"?" * 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--answered-by", required=True, help="model name that every reply has to bear")
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--qos", type=int, choices=(0, 1), default=0)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    load = Load(arguments.port, arguments.topic.encode(), arguments.qos, arguments.answered_by)
    load.run(arguments.in_flight, WARM_UP_S)
    print(json.dumps(load.run(arguments.in_flight, arguments.seconds)))


class Load:
    def __init__(self, port: int, topic: bytes, qos: int, answered_by: str, *, deadline_ms: int = DEADLINE_MS) -> None:
        self._client = RawClient(port, client_id=CLIENT, topic_filter=REPLIES, qos=qos)
        self._qos = qos
        self._number = 0
        # New in every process: an agent answers a request that it has seen from memory.
        self._run = secrets.token_hex(4).encode()
        self._answered_by = f'"model_name":"{answered_by}"'.encode()
        self._head, self._tail = request_parts(topic, qos, deadline_ms)
        self._sent_s: dict[bytes, float] = {}

    def run(self, in_flight: int, seconds: float) -> dict[str, float]:
        """Keep `in_flight` requests under way for `seconds`, then wait for the last of them."""
        self._sent_s = {}
        latencies_s: list[float] = []
        started_s = time.perf_counter()
        end_s = started_s + seconds
        self._client.send(b"".join([self._request() for _ in range(in_flight)]))
        in_time = 0
        while self._sent_s:
            outgoing = []
            for header, packet in self._client.packets():
                if header & 0xF0 != PUBLISH:
                    continue
                reply = decode_publication(header, packet, has_properties=True)
                now_s = time.perf_counter()
                payload = reply.payload.replace(b'": "', b'":"')
                assert b'"outputs"' in payload, reply
                assert self._answered_by in payload, reply
                assert reply.correlation is not None
                latencies_s.append(now_s - self._sent_s.pop(reply.correlation))
                if reply.qos:
                    outgoing.append(acknowledgement(reply.packet_id))
                if now_s < end_s:
                    in_time += 1
                    outgoing.append(self._request())
            if outgoing:
                self._client.send(b"".join(outgoing))
        cuts_ms = [cut * 1000 for cut in quantiles(latencies_s, n=100)]
        return {"rps": in_time / seconds, "p50_ms": cuts_ms[49], "p99_ms": cuts_ms[98], "replies": len(latencies_s)}

    def _request(self) -> bytes:
        self._number += 1
        correlation = self._run + b"%08d" % self._number
        self._sent_s[correlation] = time.perf_counter()
        identifier = struct.pack("!H", self._number % 65535 + 1) if self._qos else b""
        return self._head + identifier + self._tail.replace(PLACEHOLDER, correlation, 1)


def request_parts(topic: bytes, qos: int, deadline_ms: int = DEADLINE_MS) -> tuple[bytes, bytes]:
    """Return a PUBLISH before and after its packet identifier; the correlation data are PLACEHOLDER."""
    values = [round(math.sin(index), 4) for index in range(FEATURES)]
    tensor = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": values}
    payload = json.dumps({"inputs": [tensor]}).encode()
    properties = (
        b"\x02" + struct.pack("!I", -(-deadline_ms // 1000))
        + b"\x03" + sized(b"application/json")
        + b"\x08" + sized(REPLIES.encode())
        + b"\x09" + sized(PLACEHOLDER)
        + encode_words([("deadline-ms", str(deadline_ms))])
    )  # fmt: skip
    before, after = sized(topic), with_length(properties) + payload
    size = len(before) + (2 if qos else 0) + len(after)
    length = with_length(b"\x00" * size)[:-size]
    return bytes([PUBLISH | qos << 1]) + length + before, after


if __name__ == "__main__":
    main()
