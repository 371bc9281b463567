"""The devices of a soak: MQTT 5 and 3.1.1 spoken by hand in one event loop, some of them slow, hostile or repetitive.

Each keeps one connection and makes it again when it is lost. A request goes out once, with the time that is left, and
now and then again with less: what a device does after a broken connection. Nothing is sent while there is none.
"""

import asyncio
import math
import random
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import orjson

from benchmarks.raw_mqtt import CONNACK, PUBACK, PUBLISH, SUBACK, remaining_length, sized
from benchmarks.soak_record import Asked, Record, Reply
from edge_agent.front.mqtt.publication import (
    Publication,
    decode_publication,
    encode_content_type,
    encode_correlation,
    encode_expiry,
    encode_words,
    with_length,
)

_RESPONSE_TOPIC = b"\x08"
RECONNECT_S = 0.3
# What mosquitto lets a client have under way (max_inflight_messages).
MAX_UNACKNOWLEDGED = 20
DEADLINES_S = (2.0, 3.0, 5.0)
COPIED_SHARE = 0.15
COPIED_AFTER_S = (0.0, 0.02, 0.5)


class Link:
    """One device's connection; `pause_s` between two reads makes it a slow one."""

    def __init__(
        self,
        port: int,
        client: str,
        filter_: str,
        receive: Callable[[Publication], None],
        *,
        is_v5: bool = True,
        pause_s: float = 0.0,
    ) -> None:
        self.client = client
        self.is_v5 = is_v5
        self.is_up = False
        self._port = port
        self._filter = filter_
        self._receive = receive
        self._pause_s = pause_s
        self._writer: asyncio.StreamWriter | None = None
        self._packet = 0
        self._unacknowledged: set[int] = set()

    async def run(self) -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._serve()
            self.is_up = False
            self._unacknowledged.clear()
            await asyncio.sleep(RECONNECT_S)

    def publish(
        self, topic: bytes, payload: bytes, *, qos: int = 0, properties: bytes = b"", retain: bool = False
    ) -> bool:
        """Send a message; False: there is no connection, or too much is under way on it."""
        if not self.is_up or self._writer is None or len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            return False
        body = sized(topic)
        if qos:
            self._packet = self._packet % 65535 + 1
            self._unacknowledged.add(self._packet)
            body += struct.pack("!H", self._packet)
        body += (with_length(properties) if self.is_v5 else b"") + payload
        self._writer.write(bytes([PUBLISH | qos << 1 | retain]) + _with_size(body))
        return True

    async def _serve(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 12)
        self._writer = writer
        try:
            level = b"\x05\x02\x00\x3c\x00" if self.is_v5 else b"\x04\x02\x00\x3c"
            writer.write(b"\x10" + _with_size(b"\x00\x04MQTT" + level + sized(self.client.encode())))
            subscription = b"\x00\x01" + (b"\x00" if self.is_v5 else b"") + sized(self._filter.encode()) + b"\x01"
            buffer = b""
            while chunk := await reader.read(1 << 12):
                buffer = self._take(buffer + chunk, subscription)
                if self._pause_s:
                    await asyncio.sleep(self._pause_s)
        finally:
            writer.close()

    def _take(self, buffer: bytes, subscription: bytes) -> bytes:
        at = 0
        while True:
            size, body = remaining_length(buffer, at + 1)
            if size < 0 or body + size > len(buffer):
                return buffer[at:]
            self._handle(buffer[at], buffer[body : body + size], subscription)
            at = body + size

    def _handle(self, header: int, packet: bytes, subscription: bytes) -> None:
        assert self._writer is not None
        kind = header & 0xF0
        if kind == CONNACK:
            self._writer.write(b"\x82" + _with_size(subscription))
        elif kind == SUBACK:
            self.is_up = True
        elif kind == PUBACK:
            self._unacknowledged.discard(struct.unpack_from("!H", packet)[0])
        elif kind == PUBLISH:
            message = decode_publication(header, packet, has_properties=self.is_v5)
            if message.qos:
                self._writer.write(struct.pack("!BBH", PUBACK, 2, message.packet_id))
            self._receive(message)


@dataclass(frozen=True, slots=True)
class Habits:
    """What one device does: how often it asks, at which QoS, and with which words beside its requests."""

    kind: str
    per_s: float
    qos: int = 1
    is_v5: bool = True
    words: tuple[tuple[str, str], ...] = ()
    pause_s: float = 0.0
    content_type: str = "application/json"

    @property
    def is_slow(self) -> bool:
        return self.pause_s > 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where devices ask: the broker's port, their site, the model, and the agents, `any` among them."""

    port: int
    site: str
    model: str
    agents: Sequence[str]


class Device:
    def __init__(self, number: int, habits: Habits, place: Place, *, bodies: Sequence[bytes], record: Record) -> None:
        self._habits = habits
        self._name = f"{habits.kind}-{number}"
        self._requests = f"nf/v1/{place.site}/infer"
        self._replies = f"nf/v1/{place.site}/clients/{self._name}/replies"
        self._model = place.model
        self._agents = place.agents
        self._bodies = bodies
        self._record = record
        filter_ = self._replies if habits.is_v5 else f"{self._replies}/+"
        self.link = Link(place.port, self._name, filter_, self._receive, is_v5=habits.is_v5, pause_s=habits.pause_s)

    async def run(self) -> None:
        """Ask at random times, for ever."""
        while True:
            await asyncio.sleep(random.expovariate(self._habits.per_s))
            self._ask()

    def _ask(self) -> None:
        # `any` goes to whichever agent is next, and so would a copy: copies are for one that remembers.
        agent = random.choice(self._agents)
        is_copied = agent != "any" and random.random() < COPIED_SHARE
        correlation = secrets.token_hex(8)
        body = random.choice(self._bodies)
        deadline_s = time.monotonic() + random.choice(DEADLINES_S)
        span = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01" if is_copied else None
        if not self._send(agent, correlation, body, deadline_s, span):
            return
        asked = Asked(
            self._habits.kind,
            time.monotonic(),
            deadline_s,
            must_be_answered=not self._habits.is_slow,
            is_timed=self._habits.is_v5 and not self._habits.is_slow,
        )
        self._record.ask(correlation, asked)
        if is_copied:
            loop = asyncio.get_running_loop()
            loop.call_later(random.choice(COPIED_AFTER_S), self._copy, agent, correlation, body, deadline_s, span)

    def _copy(self, agent: str, correlation: str, body: bytes, deadline_s: float, span: str | None) -> None:
        if self._send(agent, correlation, body, deadline_s, span):
            self._record.copied(correlation)

    def _send(self, agent: str, correlation: str, body: bytes, deadline_s: float, span: str | None) -> bool:
        left_ms = max(1, round((deadline_s - time.monotonic()) * 1000))
        words = [("deadline-ms", str(left_ms)), *self._habits.words]
        if span is not None:
            words.append(("traceparent", span))
        topic = f"{self._requests}/{agent}/{self._model}"
        if self._habits.is_v5:
            properties = request_properties(
                self._replies, correlation.encode(), left_ms, words, content_type=self._habits.content_type
            )
            return self.link.publish(topic.encode(), body, qos=self._habits.qos, properties=properties)
        parameters: dict[str, object] = {name.replace("-", "_"): value for name, value in words}
        parameters["deadline_ms"] = left_ms
        payload = orjson.dumps({**orjson.loads(body), "parameters": parameters})
        return self.link.publish(f"{topic}/{self._name}/{correlation}".encode(), payload, qos=self._habits.qos)

    def _receive(self, message: Publication) -> None:
        now_s = time.monotonic()
        if self._habits.is_v5:
            words = {key.decode(): value.decode() for key, value in message.words}
            name = (message.correlation or b"").decode()
        else:
            parameters = orjson.loads(message.payload).get("parameters", {})
            words = {key: str(value) for key, value in parameters.items()}
            name = message.topic.decode().rpartition("/")[2]
        reply = Reply(words["status"], words["final"] == "1", words.get("reason", ""), words.get("traceparent"))
        self._record.reply(name, reply, now_s=now_s)


class Hostile:
    """A device that sends what no agent should take; nobody waits for its answers."""

    def __init__(self, place: Place, *, record: Record) -> None:
        self._record = record
        self._base = f"nf/v1/{place.site}/infer/{place.agents[0]}"
        self._model = place.model
        self._replies = f"nf/v1/{place.site}/clients/hostile/replies"
        self._foreign = "nf/v1/elsewhere/clients/hostile/replies"
        self.link = Link(place.port, "hostile", f"{self._replies}/#", lambda _: None)

    async def run(self, per_s: float) -> None:
        while True:
            await asyncio.sleep(random.expovariate(per_s))
            topic, payload, properties = random.choice(self._tricks())
            # The broker refuses some of it by hanging up, which is its right.
            if self.link.publish(topic.encode(errors="surrogateescape"), payload, properties=properties):
                self._record.counts["hostile"] += 1

    def _tricks(self) -> Sequence[tuple[str, bytes, bytes]]:
        topic, body = f"{self._base}/{self._model}", b'{"inputs": []}'
        well = request_properties(self._replies, b"h1", 2000, [("deadline-ms", "2000")])
        return (
            (f"{self._base}/{'a' * 200}", body, well),
            (f"{self._base}/.hidden", body, well),
            (f"{topic}/a@b@c/r1", body, well),
            (topic, b"[" * 20_000, well),
            (topic, secrets.token_bytes(500), well),
            (topic, b"", well),
            (topic, body, request_properties(self._foreign, b"h2", 2000, [])),
            (topic, body, request_properties("somewhere/else", b"h3", 2000, [])),
            (topic, body, request_properties(self._replies, b"x" * 1000, 2000, [])),
            (topic, body, request_properties(self._replies, b"h4", 2000, [("privacy", "\ufeffany")])),
            (topic, body, request_properties(self._replies, b"h5", 2000, [("priority", "9" * 500)])),
            (topic, body, request_properties(self._replies, b"h6", 2000, [("deadline-ms", "-5")])),
            (topic, body, request_properties(self._replies, b"h7", 2000, [("k", "v" * 100)] * 200)),
            (topic, body, b""),
        )


def request_properties(
    replies: str,
    correlation: bytes,
    deadline_ms: int,
    words: Sequence[tuple[str, str]],
    *,
    content_type: str = "application/json",
) -> bytes:
    return (
        encode_expiry(math.ceil(deadline_ms / 1000))
        + encode_content_type(content_type)
        + _RESPONSE_TOPIC
        + sized(replies.encode())
        + encode_correlation(correlation)
        + encode_words(words)
    )


def _with_size(body: bytes) -> bytes:
    # The variable byte integer of a length is the same for properties and packets.
    return with_length(body)
