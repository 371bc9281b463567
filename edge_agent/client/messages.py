"""Requests and replies as MQTT messages, as a device writes and reads them (docs/mqtt.md).

MQTT 5 carries what belongs to the request (deadline, trace, privacy) as properties; MQTT 3.1.1 has none, so the same
words stand in the body's `parameters` and the request id in the topic.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from paho.mqtt.client import MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

# Said by an agent that another may answer instead: too much to do, not ready, or it has no such model.
ELSEWHERE_STATUSES = frozenset({404, 429, 503})
# Of a refusal that does not say how long it holds; chosen: a few queue lengths of a small model.
DEFAULT_RETRY_AFTER_S = 0.05


class Protocol(Enum):
    MQTT_5 = "5"
    MQTT_311 = "3.1.1"


class NoReply(Exception):
    """The deadline passed without an answer, or the broker could not be reached."""


class MalformedReply(Exception):
    """An agent answered something that is no reply of this protocol."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an agent answered; `status` is an HTTP code, `body` an Open Inference response or `{"error": text}`."""

    status: int
    body: Mapping[str, Any]
    properties: Mapping[str, str]
    # Which request it is for.
    correlation: str = ""

    @property
    def agent(self) -> str:
        return self.properties.get("agent", "")

    @property
    def tier(self) -> str:
        return self.properties.get("tier", "")

    @property
    def reason(self) -> str:
        return self.properties.get("reason", "")

    @property
    def is_final(self) -> bool:
        """False: provisional, a better one may follow under the same correlation."""
        return self.properties.get("final", "1") != "0"

    @property
    def retry_after_s(self) -> float:
        """How long a refusal holds at least."""
        text = self.properties.get("retry-after-ms", "")
        return int(text) / 1000 if text.isdecimal() and len(text) <= 10 else DEFAULT_RETRY_AFTER_S


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish; `properties` None with MQTT 3.1.1."""

    topic: str
    payload: str
    properties: Properties | None


@dataclass(frozen=True, slots=True)
class Format:
    """How one device writes its requests and reads its replies.

    `names_client`: the broker asks for certificates, so also the topic of an MQTT 5 request says who asks.
    """

    site: str
    client_id: str
    is_v5: bool
    names_client: bool

    @property
    def statuses(self) -> str:
        """The filter of all agents' status messages."""
        return f"nf/v1/{self.site}/agents/+/status"

    @property
    def replies(self) -> str:
        """The filter of the own replies."""
        topic = f"nf/v1/{self.site}/clients/{self.client_id}/replies"
        return topic if self.is_v5 else f"{topic}/+"

    def agent_of(self, topic: str) -> str | None:
        """Return whose status a topic carries; None: it is another kind of topic."""
        before, _, rest = topic.partition(f"nf/v1/{self.site}/agents/")
        agent, _, end = rest.partition("/")
        return agent if agent and end == "status" and not before else None

    def request(
        self,
        *,
        agent: str,
        model: str,
        body: Mapping[str, Any],
        correlation: str,
        left_ms: int,
        words: Mapping[str, str],
    ) -> Outgoing:
        """Return a request to `agent` that has `left_ms` to be answered."""
        topic = f"nf/v1/{self.site}/infer/{agent}/{model}"
        if not self.is_v5:
            parameters: dict[str, Any] = {key.replace("-", "_"): value for key, value in words.items()}
            parameters["deadline_ms"] = left_ms
            whole = {**body, "parameters": {**body.get("parameters", {}), **parameters}}
            return Outgoing(f"{topic}/{self.client_id}/{correlation}", json.dumps(whole), None)
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]  # paho leaves it unannotated
        properties.ResponseTopic = self.replies
        properties.CorrelationData = correlation.encode()
        properties.MessageExpiryInterval = math.ceil(left_ms / 1000)
        properties.ContentType = "application/json"
        properties.UserProperty = [("deadline-ms", str(left_ms)), *words.items()]
        named = f"{topic}/{self.client_id}" if self.names_client else topic
        return Outgoing(named, json.dumps(body), properties)

    def correlation_of(self, message: MQTTMessage) -> str:
        """Return which request a reply is for."""
        if self.is_v5:
            data: bytes = getattr(message.properties, "CorrelationData", b"")
            return data.decode(errors="replace")
        return message.topic.rpartition("/")[2]

    def reply(self, message: MQTTMessage) -> Reply:
        """Return what a message says.

        Raises:
            MalformedReply: it is not a JSON object with a status.
        """
        try:
            # Only an object has items.
            body: dict[str, Any] = dict(json.loads(message.payload).items())
            if self.is_v5:
                properties = dict(getattr(message.properties, "UserProperty", []))
            else:
                properties = {key.replace("_", "-"): str(value) for key, value in body.get("parameters", {}).items()}
            return Reply(int(properties["status"]), body, properties, self.correlation_of(message))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MalformedReply(f"expected a JSON reply with a status on {message.topic}, got {error!r}") from error
