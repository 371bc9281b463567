"""Replies on their way out are bounded, whatever the broker does."""

from typing import cast

from edge_agent.front.mqtt.broker import Broker
from edge_agent.front.mqtt.counters import FrontCounters
from edge_agent.front.mqtt.replies import Replies
from edge_agent.front.mqtt.wire import Reply
from tests.support.clocks import HeldClock


class SilentBroker:
    """Takes everything and confirms nothing."""

    is_online = True

    def __init__(self) -> None:
        self.published = 0

    def publish(self, topic: str, payload: bytes, *, qos: int, properties: bytes | None) -> int:
        self.published += 1
        return self.published


async def test_a_broker_that_confirms_nothing_gets_no_more_than_can_be_kept_until_it_does() -> None:
    counters, broker = FrontCounters(), SilentBroker()
    replies = Replies(counters, clock=HeldClock())
    replies.broker = cast("Broker", broker)
    for _ in range(5000):
        replies.send(Reply("topic", b"{}", 1, None, 10.0))
    assert (broker.published, counters.replied, counters.late) == (4096, 4096, 904)
    replies.acknowledged(1)
    replies.send(Reply("topic", b"{}", 1, None, 10.0))
    assert broker.published == 4097
