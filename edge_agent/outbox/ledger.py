"""What became of requests, by the hour and model, so that days without a controller are not lost to whoever counts.

An hour is put again every few minutes while it grows: of one hour, model and process the greater numbers count, so that
putting, sending and taking it twice changes nothing. Hours are counted from the wall clock as it was at the start, by
the monotonic one: a clock that jumps moves no request into another hour, and no hour comes twice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from core.clock import Clock
from core.fleet_state import Usage
from edge_agent.outbox.records import usage_body
from edge_agent.outbox.rows import Kind
from protos.records.v1 import records_pb2 as pb

HOUR_S = 3600
# Chosen: a power cut costs so much of the count, and the flash is written so often at most.
FLUSH_INTERVAL_S = 300.0
_NOTHING = Usage(0, 0, 0, 0)


class Outbox(Protocol):
    def put(self, kind: Kind, body: bytes, *, dedupe_id: str) -> bool: ...


class UsageLedger:
    """`counts` says what became of requests since the process began, by model."""

    def __init__(
        self,
        counts: Callable[[], Mapping[str, Usage]],
        outbox: Outbox,
        *,
        boot_id: str,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._counts = counts
        self._outbox = outbox
        self._boot_id = boot_id
        self._clock = clock
        self._sleep = sleep
        self._epoch_s = clock.now().timestamp() - clock.monotonic_s()
        self._hour = self._hour_now()
        # Of each model: when the hour began, and what was put of it.
        self._begun: dict[str, Usage] = {}
        self._written: dict[str, Usage] = {}

    async def run(self) -> None:
        while True:
            left_s = (self._hour + 1) * HOUR_S - self._steady_s()
            await self._sleep(min(FLUSH_INTERVAL_S, max(0.0, left_s)))
            self.flush()

    def flush(self) -> None:
        """Put what has grown; at the end of an hour, begin the next one."""
        counts = dict(self._counts())
        for model, total in counts.items():
            grown = _difference(total, self._begun.get(model, _NOTHING))
            if grown != self._written.get(model, _NOTHING) and self._put(model, grown):
                self._written[model] = grown
        hour = self._hour_now()
        if hour > self._hour:
            self._hour, self._begun, self._written = hour, counts, {}

    def _put(self, model: str, grown: Usage) -> bool:
        usage = pb.Usage(
            boot_id=self._boot_id,
            model=model,
            answered_edge=grown.answered_edge,
            answered_heavy=grown.answered_heavy,
            refused=grown.refused,
            failed=grown.failed,
        )
        usage.hour.FromSeconds(self._hour * HOUR_S)
        dedupe_id = f"{self._boot_id}/{self._hour}/{model}"
        body = usage_body(usage, dedupe_id=dedupe_id, at=self._clock.now())
        return self._outbox.put(Kind.USAGE, body, dedupe_id=dedupe_id)

    def _steady_s(self) -> float:
        return self._epoch_s + self._clock.monotonic_s()

    def _hour_now(self) -> int:
        return int(self._steady_s() // HOUR_S)


def _difference(after: Usage, before: Usage) -> Usage:
    return Usage(
        after.answered_edge - before.answered_edge,
        after.answered_heavy - before.answered_heavy,
        after.refused - before.refused,
        after.failed - before.failed,
    )
