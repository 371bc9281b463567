"""The requests from devices that are under way, and who may add one: the last places are for clients with few.

A client that asks without pause would have every place, whatever the queues of the models behind say. So beyond seven
eighths of them only a client with less than an equal share gets one.
"""

from collections.abc import Iterator

from edge_agent.front.mqtt.exchange import Exchange


class InFlight:
    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._open_to_all = max_requests - max_requests // 8
        self._exchanges: set[Exchange] = set()
        self._by_client: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._exchanges)

    def __iter__(self) -> Iterator[Exchange]:
        return iter(self._exchanges)

    def has_place_for(self, client: str) -> bool:
        count = len(self._exchanges)
        if count < self._open_to_all:
            return True
        if count >= self._max_requests:
            return False
        return self._by_client.get(client, 0) * len(self._by_client) < count

    def add(self, exchange: Exchange) -> None:
        """Note a request; one that is there stays there once."""
        if exchange not in self._exchanges:
            self._exchanges.add(exchange)
            client = exchange.address.client
            self._by_client[client] = self._by_client.get(client, 0) + 1

    def discard(self, exchange: Exchange) -> None:
        if exchange not in self._exchanges:
            return
        self._exchanges.discard(exchange)
        client = exchange.address.client
        left = self._by_client[client] - 1
        if left:
            self._by_client[client] = left
        else:
            del self._by_client[client]
