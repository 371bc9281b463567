"""The device's side of the MQTT protocol: ask the nearest agent, get one reply. Needs nothing but paho-mqtt.

`device` is what an application uses. It asks `failover` what to do next about a request, `survey` who could answer it,
and `connection` to carry it. What decides (`directory`, `measurements`, `ranking`, `failover`, `survey`, `probing`)
knows neither clock nor network.
"""

from edge_agent.client.device import DeviceClient
from edge_agent.client.exchanges import DeviceCounters
from edge_agent.client.messages import MalformedReply, NoReply, Protocol, Reply

__all__ = ["DeviceClient", "DeviceCounters", "MalformedReply", "NoReply", "Protocol", "Reply"]
