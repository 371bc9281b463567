"""Ask the broker as the agent would: is it there, does it permit what the agent does, does it answer at once.

A connection of its own under another client id, so that a running agent is not thrown out. Where brokers make the
client id from the certificate there is no other: then only the port is tried beside a running agent. It subscribes to
requests for this agent by name and never to those for any agent of the site, which it would take away from the others;
and it acknowledges nothing that comes, so that the agent gets it.
"""

import socket
import ssl
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from core.addresses import Address
from core.doctor import Finding, ok, problem, skipped, warning
from core.ids import AgentId, SiteId
from core.machine_checks import port_answers
from edge_agent.front.mqtt.connection import SESSION_EXPIRY_S
from edge_agent.front.mqtt.topics import PREFIX, Topics
from edge_agent.settings import MqttSettings

_ANSWER_TIMEOUT_S = 4.0
_LOOP_S = 0.05
# The kernel acknowledges the first packets of a connection at once, which hides what Nagle's algorithm costs.
_WARM_UP, _ROUNDS = 20, 11
# Between what it costs with Nagle's algorithm, 44 ms, and without on a busy board, some milliseconds (measured).
_SLOW_S = 0.035
_PERMISSIONS = (
    "let the agent's identity read {prefix}/{site}/infer/{agent}/# and write {prefix}/{site}/agents/{agent}/status "
    "and {prefix}/{site}/clients/+/replies/# in the broker's ACL"
)


@dataclass(frozen=True, slots=True)
class BrokerIdentity:
    """What is shown to a broker over TLS, whom to believe, and the name that must stand in its certificate."""

    context: ssl.SSLContext
    server_name: str


@dataclass(slots=True)
class Heard:
    """What the broker answered."""

    refusal: str = ""
    # Topic filter or topic → why it is not permitted; "" when it is.
    subscribed: dict[str, str] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    round_trips_s: list[float] = field(default_factory=list)


def check_broker(
    settings: MqttSettings, site: SiteId, agent: AgentId, *, is_running: bool, tls: BrokerIdentity | None = None
) -> Sequence[Finding]:
    """Return the findings `broker`, `broker permissions` and `broker delay`."""
    if not settings.enabled:
        return (skipped("broker", "switched off in the settings (mqtt.enabled)"),)
    where = f"{settings.host}:{settings.port}"
    if tls is not None and is_running:
        return (
            port_answers("broker", Address(settings.host, settings.port), remedy="start it, or correct mqtt.host"),
            skipped("broker permissions", "the agent runs, and the broker knows one connection per certificate"),
        )
    try:
        heard = ask(settings, site, agent, is_running=is_running, tls=tls)
    except ssl.SSLError as error:
        found = f"{where}: TLS: {error.reason or error}"
        remedy = "see `openssl s_client`: does its certificate name mqtt.host, and is its authority the one we believe?"
        return (problem("broker", found, expected="a broker that proves who it is", remedy=remedy),)
    except OSError as error:
        found = f"{where}: {error.strerror or error}"
        remedy = "start the broker (`systemctl start mosquitto`), or set mqtt.host and mqtt.port to where it listens"
        return (problem("broker", found, expected="a broker that takes connections", remedy=remedy),)
    if heard.refusal:
        remedy = "see the broker's log; check allow_anonymous, the password or certificate, and mqtt.protocol"
        return (problem("broker", f"{where} refuses: {heard.refusal}", expected="to be let in", remedy=remedy),)
    return (ok("broker", f"{where} answers"), judge_permissions(heard, site, agent), judge_delay(heard))


def judge_permissions(heard: Heard, site: SiteId, agent: AgentId) -> Finding:
    check = "broker permissions"
    refused = [f"{topic} ({why})" for topic, why in (heard.subscribed | heard.published).items() if why]
    if refused:
        remedy = _PERMISSIONS.format(prefix=PREFIX, site=site, agent=agent)
        return problem(check, f"refused: {', '.join(refused)}", expected="all that an agent does", remedy=remedy)
    return ok(check, f"{len(heard.subscribed)} subscriptions and {len(heard.published)} publications permitted")


def judge_delay(heard: Heard) -> Finding:
    check = "broker delay"
    if not heard.round_trips_s:
        return skipped(check, "the doctor's own message did not come back; the ACL may not let it")
    median_s = statistics.median(heard.round_trips_s)
    found = f"a QoS 1 round trip takes {median_s * 1000:.1f} ms"
    if median_s >= _SLOW_S:
        return warning(
            check,
            found,
            expected="some milliseconds; 44 ms is what Nagle's algorithm costs",
            remedy="set `set_tcp_nodelay true` in mosquitto.conf and restart it",
        )
    return ok(check, found)


def ask(
    settings: MqttSettings, site: SiteId, agent: AgentId, *, is_running: bool, tls: BrokerIdentity | None = None
) -> Heard:
    """Connect, subscribe, publish and leave.

    Raises:
        OSError: nobody answers there, or, as SSLError, does not prove to be the broker.
    """
    probe = _Probe(settings, f"{agent}-doctor", tls)
    try:
        if not probe.connect():
            return probe.heard
        topics = Topics(site, agent, requires_client=settings.requires_client, shared_by=settings.share_group)
        back = f"{PREFIX}/{site}/clients/{agent}-doctor/replies"
        own = [topic for topic, _ in topics.filters(is_v5=settings.protocol == 5) if not topic.startswith("$share")]
        for topic in own:
            probe.subscribe(topic)
        probe.publish(back, b"{}")
        if not is_running:
            # What is true; not retained, so that it is news to nobody who comes later.
            probe.publish(topics.status, b'{"state":"offline","epoch":0}')
        probe.measure(back)
        return probe.heard
    finally:
        probe.leave()


class _DialledClient(Client):
    """Dials itself: without Nagle's algorithm, and with TLS for whatever name the broker's certificate has."""

    dial: Callable[[], socket.socket]

    def _create_socket(self) -> Any:
        return self.dial()


class _Probe:
    def __init__(self, settings: MqttSettings, client_id: str, tls: BrokerIdentity | None) -> None:
        self.heard = Heard()
        self._settings = settings
        self._is_v5 = settings.protocol == 5
        protocol = MQTTProtocolVersion.MQTTv5 if self._is_v5 else MQTTProtocolVersion.MQTTv311
        self._tls = tls
        self._client = _DialledClient(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol, manual_ack=True
        )
        self._client.dial = self._dial
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_publish = self._on_publish
        self._client.on_message = self._on_message
        self._is_connected: bool | None = None
        # The connection has ended.
        self._is_over = False
        self._connected: socket.socket | None = None
        self._reasons: dict[int, str] = {}
        self._arrived = 0

    def connect(self) -> bool:
        host, port, keepalive_s = self._settings.host, self._settings.port, self._settings.keepalive_s
        if self._is_v5:
            # A session that is kept for the agent stays as it is.
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
            properties.SessionExpiryInterval = 0 if self._tls is None else SESSION_EXPIRY_S
            self._client.connect(host, port, keepalive_s, clean_start=self._tls is None, properties=properties)
        else:
            self._client.connect(host, port, keepalive_s)
        if not self._until(lambda: self._is_connected is not None):
            hung_up = "it hung up" + ("" if self._tls is None else "; does it take our certificate?")
            self.heard.refusal = hung_up if self._is_over else f"no answer to CONNECT within {_ANSWER_TIMEOUT_S:g} s"
        return self._is_connected is True

    def subscribe(self, topic: str) -> str:
        _, packet_id = self._client.subscribe(topic, qos=1)
        assert packet_id is not None
        return self._noted(self.heard.subscribed, topic, packet_id)

    def publish(self, topic: str, payload: bytes) -> str:
        return self._noted(self.heard.published, topic, self._client.publish(topic, payload, qos=1).mid)

    def measure(self, topic: str) -> None:
        """Send messages to ourselves; each is over when it came and was acknowledged.

        It comes at QoS 0: an acknowledgement of ours would carry that of TCP, for which Nagle's algorithm waits.
        """
        _, subscription = self._client.subscribe(topic, qos=0)
        assert subscription is not None
        if self._reason_of(subscription):
            return
        for kth in range(_WARM_UP + _ROUNDS):
            started_s, arrived = time.perf_counter(), self._arrived
            packet_id = self._client.publish(topic, b"{}", qos=1).mid
            if not self._until(partial(self._is_back, packet_id, arrived)):
                break
            if kth >= _WARM_UP:
                self.heard.round_trips_s.append(time.perf_counter() - started_s)
        self._client.unsubscribe(topic)

    def _is_back(self, packet_id: int, arrived_before: int) -> bool:
        return self._arrived > arrived_before and packet_id in self._reasons

    def leave(self) -> None:
        self._client.disconnect()
        self._client.loop(_LOOP_S)
        if self._connected is not None:
            self._connected.close()
        # It knows us and we know it; without this its own sockets would stay open until somebody collects garbage.
        del self._client

    def _dial(self) -> socket.socket:
        where = (self._settings.host, self._settings.port)
        connected = socket.create_connection(where, timeout=_ANSWER_TIMEOUT_S)
        self._connected = connected
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            self._connected = self._tls.context.wrap_socket(connected, server_hostname=self._tls.server_name)
        return self._connected

    def _noted(self, said: dict[str, str], topic: str, packet_id: int) -> str:
        said[topic] = self._reason_of(packet_id)
        return said[topic]

    def _reason_of(self, packet_id: int) -> str:
        if not self._until(lambda: packet_id in self._reasons):
            return f"no answer within {_ANSWER_TIMEOUT_S:g} s"
        return self._reasons[packet_id]

    def _until(self, is_done: Callable[[], bool]) -> bool:
        until_s = time.monotonic() + _ANSWER_TIMEOUT_S
        while not is_done():
            self._is_over = self._is_over or self._client.loop(_LOOP_S) is not MQTTErrorCode.MQTT_ERR_SUCCESS
            if self._is_over or time.monotonic() > until_s:
                return is_done()
        return True

    def _on_connect(self, _client: Client, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._is_connected = not reason.is_failure
        self.heard.refusal = str(reason) if reason.is_failure else ""

    def _on_subscribe(self, _client: Client, _user: Any, packet_id: int, reasons: Any, _properties: Any) -> None:
        self._reasons[packet_id] = str(reasons[0]) if reasons[0].is_failure else ""

    def _on_publish(self, _client: Client, _user: Any, packet_id: int, reason: Any, _properties: Any) -> None:
        self._reasons[packet_id] = str(reason) if reason.is_failure else ""

    def _on_message(self, _client: Client, _user: Any, _message: Any) -> None:
        self._arrived += 1
