"""A steady stream of requests from devices, and the one outcome that each of them had."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from edge_agent.client import DeviceClient, NoReply

# A breath between two requests of one device, so that the stream loads the machine lightly.
PAUSE_S = 0.01


@dataclass(slots=True)
class Stream:
    """What the devices saw: `heavy`, `edge/<reason>`, `refused/<status>` or `no reply`, in the order of the ends."""

    outcomes: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, outcome: str) -> None:
        with self._changed:
            self.outcomes.append(outcome)
            self._changed.notify_all()

    def wait_for(self, wanted: str, *, after: int | None = None, count: int = 5, timeout_s: float = 60.0) -> None:
        """Wait until `count` outcomes that begin with `wanted` have come since position `after` (default: now)."""
        with self._changed:
            start = len(self.outcomes) if after is None else after
            came = self._changed.wait_for(lambda: self.count(wanted, after=start) >= count, timeout_s)
        assert came, f"expected {count} x {wanted} within {timeout_s} s, got {Counter(self.outcomes[start:])}"

    def count(self, wanted: str, *, after: int = 0) -> int:
        return sum(outcome.startswith(wanted) for outcome in self.outcomes[after:])

    def position(self) -> int:
        return len(self.outcomes)


@contextmanager
def asking(
    devices: Sequence[DeviceClient], model: str, requests: Sequence[dict[str, Any]], *, agent: str, deadline_s: float
) -> Iterator[Stream]:
    """Let every device ask one request after another until the block ends; all have their outcome then."""
    stream, done = Stream(), threading.Event()

    def ask_on(device: DeviceClient) -> None:
        number = 0
        while not done.wait(PAUSE_S):
            request = requests[number % len(requests)]
            stream.add(outcome_of(device, model, request, agent=agent, deadline_s=deadline_s))
            number += 1

    threads = [threading.Thread(target=ask_on, args=(device,), name=device.client_id) for device in devices]
    for thread in threads:
        thread.start()
    try:
        yield stream
    finally:
        done.set()
        for thread in threads:
            thread.join()


def outcome_of(device: DeviceClient, model: str, request: dict[str, Any], *, agent: str, deadline_s: float) -> str:
    try:
        reply = device.ask(model, request, agent=agent, deadline_s=deadline_s)
    except NoReply:
        return "no reply"
    if reply.status != 200:
        return f"refused/{reply.status}"
    return "heavy" if reply.tier == "heavy" else f"edge/{reply.reason}"
