"""What bringing a variant in has cost so far, as the operator sees it."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Self

from core.clock import Clock
from core.fleet_state import Transfer
from edge_agent.sync.source import Codec

# Chosen: often enough for a progress bar, seldom enough to cost nothing.
PROGRESS_INTERVAL_S = 0.25
# Chosen: the rate is that of the last seconds, long enough that single chunks do not show in it.
_RATE_WINDOW_S = 2.0

ProgressListener = Callable[[int, int, Transfer], None]
"""Called with the bytes of the variant's files now stored, their sum, and what it has cost."""


class Meter:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._wire_bytes = 0
        self._brought_bytes = 0
        self._same_chunks = 0
        self._by_codec: Counter[Codec] = Counter()
        self._rate_bytes_per_s = 0.0
        self._window = (clock.monotonic_s(), 0)

    def begin(self) -> None:
        """Start measuring the rate: between attempts nothing travels."""
        self._window = (self._clock.monotonic_s(), self._wire_bytes)

    def copied(self, size_bytes: int) -> None:
        """Note a chunk that was in the store already."""
        self._same_chunks += 1
        self._brought_bytes += size_bytes

    def received(self, codec: Codec, wire_bytes: int) -> None:
        """Note what came, whatever it turns out to be."""
        self._by_codec[codec] += 1
        self._wire_bytes += wire_bytes
        since_s, at_bytes = self._window
        passed_s = self._clock.monotonic_s() - since_s
        if passed_s >= _RATE_WINDOW_S or (passed_s > 0 and not self._rate_bytes_per_s):
            self._rate_bytes_per_s = (self._wire_bytes - at_bytes) / passed_s
            self._window = (since_s + passed_s, self._wire_bytes)

    def brought(self, size_bytes: int) -> None:
        """Note a chunk that came and is what it should be."""
        self._brought_bytes += size_bytes

    def transfer(self) -> Transfer:
        return Transfer(
            wire_bytes=self._wire_bytes,
            brought_bytes=self._brought_bytes,
            rate_bytes_per_s=round(self._rate_bytes_per_s),
            same_chunks=self._same_chunks,
            raw_chunks=self._by_codec[Codec.RAW],
            zstd_chunks=self._by_codec[Codec.ZSTD],
            difference_chunks=self._by_codec[Codec.DIFFERENCE],
        )


class Throttle:
    """Passes progress on at most once per PROGRESS_INTERVAL_S, the last of it too; used in a `with` block on a loop."""

    def __init__(self, listener: Callable[[], None], clock: Clock) -> None:
        self._listener = listener
        self._clock = clock
        self._last_s = -PROGRESS_INTERVAL_S
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self.tell()

    def report(self) -> None:
        wait_s = self._last_s + PROGRESS_INTERVAL_S - self._clock.monotonic_s()
        if wait_s <= 0:
            self.tell()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.tell)

    def tell(self) -> None:
        """Pass it on, however lately that was done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._last_s = self._clock.monotonic_s()
        self._listener()
