"""Who may have how many requests under way."""

from dataclasses import dataclass
from typing import cast

from edge_agent.front.mqtt.envelope import Address
from edge_agent.front.mqtt.exchange import Exchange
from edge_agent.front.mqtt.in_flight import InFlight


@dataclass(frozen=True, eq=False)
class Asked:
    """What is used of an exchange."""

    address: Address


def of(client: str) -> Exchange:
    return cast("Exchange", Asked(Address(client, "digits", "topic", b"c", is_v5=True)))


def ask_until_refused(under_way: InFlight, client: str) -> int:
    count = 0
    while under_way.has_place_for(client):
        under_way.add(of(client))
        count += 1
    return count


def test_a_client_that_asks_without_pause_leaves_places_to_the_others() -> None:
    under_way = InFlight(64)
    assert ask_until_refused(under_way, "flood") == 56
    assert ask_until_refused(under_way, "light") == 8
    assert len(under_way) == 64


def test_nobody_gets_a_place_beyond_the_bound() -> None:
    under_way = InFlight(8)
    for number in range(8):
        assert under_way.has_place_for(f"client-{number}")
        under_way.add(of(f"client-{number}"))
    assert not under_way.has_place_for("another")


def test_a_bound_of_one_is_one() -> None:
    under_way = InFlight(1)
    assert ask_until_refused(under_way, "a") == 1


def test_a_place_is_free_when_its_request_is_answered_and_counted_once() -> None:
    under_way = InFlight(16)
    asked = of("flood")
    under_way.add(asked)
    under_way.add(asked)
    assert ask_until_refused(under_way, "flood") == 13
    under_way.discard(asked)
    under_way.discard(asked)
    assert ask_until_refused(under_way, "flood") == 1
    assert len(under_way) == 14
