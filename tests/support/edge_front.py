"""The MQTT front of an agent in this process, on a real broker; and a device that can say anything.

async with serving(broker, echo_model()) as front, device(broker) as camera:
    await camera.send(body_of(SURE))
    reply = await camera.reply()
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import orjson
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from core.clock import SystemClock
from core.ids import AgentId, SiteId
from core.metrics import Registry
from core.telemetry import Tracing
from edge_agent.cascade.deferral import Deferrals
from edge_agent.client.connection import disable_nagle
from edge_agent.data_plane import EdgeDataPlane
from edge_agent.front.mqtt.broker import BrokerState
from edge_agent.front.mqtt.front import MqttFront
from edge_agent.front.mqtt.tls import BrokerTls
from edge_agent.hard_examples import HardExamples
from edge_agent.request_metrics import RequestMetrics
from edge_agent.request_services import Escalation
from edge_agent.runtime.pool import LoadedModel, ModelPool
from edge_agent.settings import MqttSettings, RuntimeSettings
from tests.support.edge_plane import SURE, UNSAMPLED, FakeHeavy
from tests.support.mosquitto import Mosquitto

SITE, AGENT = "berlin", "gate-1"
REQUESTS = f"nf/v1/{SITE}/infer/{AGENT}/digits"
CLIENT = "camera-1"
REPLIES = f"nf/v1/{SITE}/clients/{CLIENT}/replies"
TIMEOUT_S = 10.0
# Waited before saying that nothing comes; a reply on this machine takes a millisecond.
SILENCE_S = 0.5


@asynccontextmanager
async def serving(
    broker: Mosquitto,
    *models: LoadedModel,
    pool: ModelPool | None = None,
    heavy: Escalation | None = None,
    settings: Mapping[str, Any] | None = None,
    tracing: Tracing | None = None,
    agent: str = AGENT,
    tls: BrokerTls | None = None,
    deferrals: Deferrals | None = None,
    examples: HardExamples | None = None,
    metrics: Registry | None = None,
    expected: BrokerState = BrokerState.ONLINE,
) -> AsyncIterator[MqttFront]:
    """Yield a front once its connection to `broker` is as `expected`; it has said goodbye afterwards."""
    clock = SystemClock()
    pool = pool or ModelPool(RuntimeSettings(), clock=clock)
    for model in models:
        await pool.host(model)
    plane = EdgeDataPlane(
        pool,
        heavy or FakeHeavy(),
        tracing=tracing or Tracing("test", UNSAMPLED),
        clock=clock,
        metrics=None if metrics is None else RequestMetrics(metrics, clock=clock),
        deferrals=deferrals,
        examples=examples,
    )
    quick = {"port": broker.port, "reconnect_base_s": 0.05, "reconnect_cap_s": 0.2}
    front = MqttFront(
        MqttSettings(**{**quick, **(settings or {})}),
        site=SiteId(SITE),
        agent=AgentId(agent),
        plane=plane,
        pool=pool,
        clock=clock,
        tls=tls,
        metrics=metrics,
    )
    task = asyncio.create_task(front.run(), name="front")
    try:
        await until(front, expected)
        yield front
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await plane.close()
        await pool.close()


async def until(front: MqttFront, state: BrokerState) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while front.state is not state:
            await asyncio.sleep(0.01)


def body_of(values: Sequence[float] = SURE, **parameters: object) -> bytes:
    tensor = {"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": list(values)}
    return orjson.dumps({"inputs": [tensor], **({"parameters": parameters} if parameters else {})})


@dataclass(frozen=True, slots=True)
class Received:
    topic: str
    payload: bytes
    qos: int
    words: Mapping[str, str]
    correlation: bytes
    content_type: str
    expiry_s: int | None

    @property
    def body(self) -> dict[str, Any]:
        return dict(orjson.loads(self.payload))


class Device:
    """A paho client in a thread of its own, whose messages are awaited in the test's loop."""

    def __init__(
        self, broker: Mosquitto, *, topic: str, is_v5: bool, tls: ssl.SSLContext | None = None, client_id: str = ""
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._messages: asyncio.Queue[Received] = asyncio.Queue()
        self._subscribed = asyncio.Event()
        self._broker = broker
        self._topic = topic
        self._is_v5 = is_v5
        version = MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version)
        if tls is not None:
            self._client.tls_set_context(tls)
        self._client.on_message = self._on_message
        self._client.on_connect = lambda client, *_: client.subscribe(self._topic, qos=1)
        self._client.on_subscribe = self._on_subscribe
        self._client.on_socket_open = disable_nagle

    async def start(self) -> None:
        self._client.connect_async(self._broker.host, self._broker.port)
        self._client.loop_start()
        async with asyncio.timeout(TIMEOUT_S):
            await self._subscribed.wait()

    async def stop(self) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)

    def send(
        self,
        payload: bytes,
        *,
        topic: str = REQUESTS,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = b"r1",
        response_topic: str | None = REPLIES,
        expiry_s: int | None = 5,
        content_type: str | None = "application/json",
        **words: str,
    ) -> None:
        """Publish a request; a property that is None is left out. Words have `_` for `-`."""
        properties = None
        if self._is_v5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
            given = {
                "CorrelationData": correlation,
                "ResponseTopic": response_topic,
                "MessageExpiryInterval": expiry_s,
                "ContentType": content_type,
            }
            for name, value in given.items():
                if value is not None:
                    setattr(properties, name, value)
            if words:
                properties.UserProperty = [(key.replace("_", "-"), value) for key, value in words.items()]
        self._client.publish(topic, payload, qos, retain, properties)

    async def reply(self, *, timeout_s: float = TIMEOUT_S) -> Received:
        async with asyncio.timeout(timeout_s):
            return await self._messages.get()

    async def hears_nothing(self) -> bool:
        try:
            async with asyncio.timeout(SILENCE_S):
                await self._messages.get()
        except TimeoutError:
            return True
        return False

    def _on_subscribe(self, *_: Any) -> None:
        self._loop.call_soon_threadsafe(self._subscribed.set)

    def _on_message(self, _client: Client, _user: Any, message: MQTTMessage) -> None:
        properties = message.properties
        received = Received(
            message.topic,
            bytes(message.payload),
            message.qos,
            dict(getattr(properties, "UserProperty", [])),
            getattr(properties, "CorrelationData", b""),
            getattr(properties, "ContentType", ""),
            getattr(properties, "MessageExpiryInterval", None),
        )
        self._loop.call_soon_threadsafe(self._messages.put_nowait, received)


@asynccontextmanager
async def device(
    broker: Mosquitto,
    *,
    topic: str = REPLIES,
    is_v5: bool = True,
    tls: ssl.SSLContext | None = None,
    client_id: str = "",
) -> AsyncIterator[Device]:
    made = Device(broker, topic=topic, is_v5=is_v5, tls=tls, client_id=client_id)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()
