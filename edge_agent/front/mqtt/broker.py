"""The agent's place at the broker: connects, says what it is, and comes back with full jitter when it is thrown out.

Each connection has an epoch that is greater than all before it. It stands in the birth message and in the Will, so that
a Will which the broker publishes late cannot be taken for news about the next connection.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from enum import Enum

import orjson

from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.errors import Unavailable
from core.logs import peer_text
from edge_agent.front.mqtt.connection import (
    UNLIMITED_PACKET_BYTES,
    BrokerConnection,
    ConnectionSettings,
    ConnectionState,
    Will,
)
from edge_agent.front.mqtt.publication import Publication

_log = logging.getLogger(__name__)

# A connection that lasted this long was a good one: the next failure starts from the shortest delay again. Chosen: two
# agents that use one name throw each other out at once, and must not do so at full speed.
STABLE_S = 5.0


class BrokerState(Enum):
    STOPPED = "stopped"
    CONNECTING = "connecting"
    ONLINE = "online"
    WAITING = "waiting"


class Broker:
    """Owns one connection at a time; `run` it as a task for as long as the agent lives."""

    def __init__(
        self,
        settings: ConnectionSettings,
        *,
        status_topic: str,
        describe: Callable[[], Mapping[str, object]],
        receive: Callable[[Publication], None],
        acknowledged: Callable[[int], None],
        opened: Callable[[], None],
        closed: Callable[[], None],
        backoff: BackoffPolicy,
        clock: Clock,
    ) -> None:
        self.state = BrokerState.STOPPED
        self.last_error: str | None = None
        # What the broker takes, as it said last.
        self.max_packet_bytes = UNLIMITED_PACKET_BYTES
        self._settings = settings
        self._status_topic = status_topic
        self._describe = describe
        self._receive = receive
        self._acknowledged = acknowledged
        self._opened = opened
        self._closed = closed
        self._backoff = Backoff(backoff)
        self._clock = clock
        self._epoch = 0
        self._connection: BrokerConnection | None = None

    @property
    def is_online(self) -> bool:
        return self._connection is not None and self._connection.state is ConnectionState.ONLINE

    async def run(self) -> None:
        """Stay connected until cancelled; then say goodbye."""
        try:
            while True:
                await self._connect_once()
                self.state = BrokerState.WAITING
                await asyncio.sleep(self._backoff.next_delay_s())
        finally:
            self.state = BrokerState.STOPPED

    def publish(self, topic: str, payload: bytes, *, qos: int, properties: bytes | None) -> int:
        """Send one message over the connection, which must be online; return its packet id."""
        assert self._connection is not None
        return self._connection.publish(topic, payload, qos=qos, properties=properties)

    def announce(self) -> None:
        """Publish what the agent is now, if anybody can hear it."""
        if self._connection is not None and self.is_online:
            self._connection.publish(self._status_topic, self._status("online"), qos=1, retain=True)

    async def _connect_once(self) -> None:
        self.state = BrokerState.CONNECTING
        # Wall-clock milliseconds grow over restarts too, without anything on disk.
        self._epoch = max(self._epoch + 1, round(self._clock.now().timestamp() * 1000))
        will = Will(self._status_topic, orjson.dumps({"state": "offline", "epoch": self._epoch}))
        connection = BrokerConnection(self._settings, will, receive=self._receive, acknowledged=self._acknowledged)
        self._connection = connection
        try:
            await connection.open()
            await self._serve(connection)
        except Unavailable as error:
            self._note(str(error))
        except asyncio.CancelledError:
            await self._leave(connection)
            raise
        finally:
            self._connection = None
            connection.abort("closed")
            self._closed()

    async def _serve(self, connection: BrokerConnection) -> None:
        started_s = self._clock.monotonic_s()
        self.state = BrokerState.ONLINE
        self.last_error = None
        self.max_packet_bytes = connection.max_packet_bytes
        _log.info("broker is connected", extra={"host": self._settings.host, "port": self._settings.port})
        self.announce()
        self._opened()
        reason = await connection.ended()
        if self._clock.monotonic_s() - started_s >= STABLE_S:
            self._backoff.reset()
        self._note(f"the connection ended: {reason}")

    async def _leave(self, connection: BrokerConnection) -> None:
        if connection.state is ConnectionState.ONLINE:
            await connection.close(self._status("offline"))

    def _note(self, error: str) -> None:
        reason = f"broker {self._settings.host}:{self._settings.port}: {peer_text(error)}"
        level = logging.DEBUG if reason == self.last_error else logging.WARNING
        self.last_error = reason
        _log.log(level, "broker is away", extra={"reason": reason})

    def _status(self, state: str) -> bytes:
        return orjson.dumps({"state": state, "epoch": self._epoch, **self._describe()})
