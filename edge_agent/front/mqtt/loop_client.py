"""paho's client as this agent uses it: the protocol is paho's, the connection and the hot path are ours.

Four of paho's parts are replaced, each in as few lines as it takes:

- `_create_socket`: the TCP connection is dialled by the loop, which must not block, and handed over.
- `_handle_publish`: PUBLISH is decoded by `publication`, for the reasons given there.
- `_do_on_publish`: told of QoS 1 alone; paho's callback comes for QoS 0 too, with objects that cost 10 us each time.
- `_max_inflight_messages`: paho keeps to a number of its own instead of the broker's.

They are not public, so the pinned version matters; the tests against a real broker cover each of them.
"""

from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from core.errors import InvalidRequest
from edge_agent.front.mqtt.buffered_socket import BufferedSocket
from edge_agent.front.mqtt.publication import Publication, decode_publication


class PackedProperties(Properties):
    """Properties that are encoded already."""

    def __init__(self, packed: bytes) -> None:
        object.__setattr__(self, "packetType", PacketTypes.PUBLISH)
        object.__setattr__(self, "_packed", packed)

    def pack(self) -> bytes:
        packed: bytes = object.__getattribute__(self, "_packed")
        return packed


class LoopClient(Client):
    """paho on a socket that is connected already, with our decoder for PUBLISH."""

    def __init__(
        self,
        connected: BufferedSocket,
        *,
        client_id: str,
        is_v5: bool,
        receive: Callable[[Publication], None],
        acknowledged: Callable[[int], None],
    ) -> None:
        version = MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if is_v5 else True,
            protocol=version,
            reconnect_on_failure=False,
        )
        self._connected = connected
        self._has_properties = is_v5
        self._receive = receive
        self._acknowledged = acknowledged

    def limit_in_flight(self, receive_maximum: int) -> None:
        """Send as many QoS 1 messages ahead as the broker takes (MQTT 5.0, section 3.2.2.3.3).

        paho keeps to a number of its own, and its setter refuses to work on a connection, which is when we know.
        """
        self._max_inflight_messages = receive_maximum

    def _create_socket(self) -> Any:
        return self._connected

    def _handle_publish(self) -> MQTTErrorCode:
        packet = self._in_packet
        try:
            publication = decode_publication(
                packet["command"], bytes(packet["packet"]), has_properties=self._has_properties
            )
        except InvalidRequest:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        self._receive(publication)
        # QoS 2 does not come: the subscriptions ask for 1 at most.
        return self._send_puback(publication.packet_id) if publication.qos else MQTTErrorCode.MQTT_ERR_SUCCESS

    def _do_on_publish(self, mid: int, reason_code: ReasonCode, properties: Properties) -> MQTTErrorCode:
        self._acknowledged(mid)
        return super()._do_on_publish(mid, reason_code, properties)
