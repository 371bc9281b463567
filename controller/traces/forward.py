"""`Forwarder`: spans go on to a collector as they came, in order, at least once.

    offer ─▶ queue in memory ─(disk thread)─▶ spool ─▶ send ─▶ done
                  └──────── the disk cannot ────────▶ send

Everything takes the way over the disk, so that there is one way; while the disk cannot be written, spans wait in
memory and the spool is tried again from time to time. What does not fit a bound is shed, the oldest first, and counted.
Nothing here ever delays or fails whoever sent the spans.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar, assert_never

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from controller.traces.otlp import span_count
from controller.traces.spool import Spool, Taken
from core.backoff import Backoff, BackoffPolicy
from core.clock import Clock
from core.logs import peer_text

_log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 32 << 20
# Chosen: many small requests go as one, or each would wait for the one before it; gRPC servers take 4 MiB by default.
MAX_SENT_BYTES = 1 << 20
# Chosen: a disk that was full is tried again often enough that memory does not run over, seldom enough to be no load.
DISK_RETRY_S = 10.0
# What a power cut may cost, as long as the collector is away.
SYNC_S = 1.0
_BACKOFF = BackoffPolicy(base_s=0.5, cap_s=30.0)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Accepted:
    """The collector has it, but for `rejected` spans, which must not come again."""

    rejected: int = 0


@dataclass(frozen=True, slots=True)
class Later:
    """It may be tried again, not before `after_s` seconds have passed."""

    reason: str
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Never:
    """The collector will not take it."""

    reason: str


class Collector(Protocol):
    """Where spans go; `controller.api.collector_client` has the real one."""

    async def export(self, payload: bytes) -> Accepted | Later | Never:
        """Hand over one serialised ExportTraceServiceRequest; a fault of any kind is an outcome, not an exception."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardCounters:
    """Spans since the start of the process; `spooled_bytes` and the rest are as of now."""

    forwarded: int = 0
    # Given up for want of room or for their age.
    shed: int = 0
    # The collector did not want them.
    refused: int = 0
    # Records of the spool whose bytes did not hold.
    damaged: int = 0
    # On disk, not yet with the collector.
    spooled_bytes: int = 0
    # Only in memory.
    queued_bytes: int = 0
    # False: the disk cannot be written, and spans wait in memory alone.
    is_spooling: bool = True


@dataclass(frozen=True, slots=True)
class _Queued:
    request: ExportTraceServiceRequest
    size_bytes: int
    spans: int
    at_s: float

    @property
    def payload(self) -> bytes:
        return self.request.SerializeToString()


class Forwarder:
    """Keep `run` running in a task of the owner, and `close` it afterwards. `open_spool` is called on a thread."""

    def __init__(
        self,
        collector: Collector,
        open_spool: Callable[[], Spool],
        *,
        clock: Clock,
        max_age_s: float,
        backoff: BackoffPolicy = _BACKOFF,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        disk_retry_s: float = DISK_RETRY_S,
    ) -> None:
        self._collector = collector
        self._open_spool = open_spool
        self._clock = clock
        self._max_age_s = max_age_s
        self._backoff = Backoff(backoff)
        self._max_queued_bytes = max_queued_bytes
        self._disk_retry_s = disk_retry_s
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="trace-spool")
        # One step at a time between memory and disk, so that the order holds.
        self._turn = asyncio.Lock()
        self._spool: Spool | None = None
        self._is_disk_failing = False
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        # Out of the queue to be sent, because there is no disk.
        self._in_hand: _Queued | None = None
        self._arrived = asyncio.Event()
        self._has_work = asyncio.Event()
        self._synced_s = 0.0
        self._is_refused = self._is_away = False
        self._forwarded = self._shed = self._refused = 0

    @property
    def counters(self) -> ForwardCounters:
        spool = self._spool
        return ForwardCounters(
            forwarded=self._forwarded,
            shed=self._shed + (0 if spool is None else spool.shed_spans),
            refused=self._refused,
            damaged=0 if spool is None else spool.damaged_records,
            spooled_bytes=0 if spool is None else spool.waiting_bytes,
            queued_bytes=self._queued_bytes,
            is_spooling=not self._is_disk_failing,
        )

    def offer(self, request: ExportTraceServiceRequest) -> None:
        """Take `request` for the collector; the oldest that wait in memory make room for it."""
        queued = _Queued(request, request.ByteSize(), span_count(request), self._now_s())
        self._queue.append(queued)
        self._queued_bytes += queued.size_bytes
        self._make_room()
        self._arrived.set()
        if self._is_disk_failing:
            self._has_work.set()

    async def run(self) -> None:
        """Store and send what was offered, in order; for ever."""
        # What an earlier process left is to be sent, whether or not anything new comes.
        self._arrived.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._store_for_ever(), name="trace-spool")
            group.create_task(self._send_for_ever(), name="trace-sender")

    async def close(self) -> None:
        """Store what waits in memory, for the next process; after `run` has ended."""
        if self._in_hand is not None:
            self._queue.appendleft(self._in_hand)
            self._queued_bytes += self._in_hand.size_bytes
            self._in_hand = None
        await self._store()
        if self._queue:
            lost = sum(queued.spans for queued in self._queue)
            _log.warning(
                "spans that waited for the collector are lost: the disk cannot take them", extra={"spans": lost}
            )
        if self._spool is not None:
            await self._on_disk_thread(self._spool.close)
        self._disk.shutdown()

    # ---- memory to disk -----------------------------------------------------------------------------------------

    async def _store_for_ever(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            await self._store()
            self._has_work.set()
            if self._is_disk_failing:
                await asyncio.sleep(self._disk_retry_s)
                self._arrived.set()

    async def _store(self) -> None:
        """Move what waits in memory to the spool, as far as the disk takes it."""
        async with self._turn:
            batch, self._queue = self._queue, deque()
            try:
                await self._on_disk_thread(lambda: self._append(batch))
            except OSError as error:
                self._note_disk(error)
            else:
                self._note_disk(None)
            finally:
                # What came meanwhile is newer.
                batch.extend(self._queue)
                self._queue = batch
                self._queued_bytes = sum(queued.size_bytes for queued in batch)
                self._make_room()

    def _append(self, batch: deque[_Queued]) -> None:
        """Append from the front of `batch` and take away what is in the spool; on the disk's thread."""
        if self._spool is None:
            self._spool = self._open_spool()
        while batch:
            queued = batch[0]
            self._spool.append(queued.payload, spans=queued.spans, now_s=queued.at_s)
            batch.popleft()
        now_s = self._clock.monotonic_s()
        if now_s - self._synced_s >= SYNC_S:
            self._spool.sync()
            self._synced_s = now_s

    def _make_room(self) -> None:
        while self._queued_bytes > self._max_queued_bytes and self._queue:
            oldest = self._queue.popleft()
            self._queued_bytes -= oldest.size_bytes
            self._shed += oldest.spans

    def _note_disk(self, error: OSError | None) -> None:
        if error is not None and not self._is_disk_failing:
            _log.warning(
                "the trace spool cannot be written; spans wait in memory, and are lost if this process ends",
                extra={"why": str(error), "memory_bytes": self._max_queued_bytes},
            )
        elif error is None and self._is_disk_failing:
            _log.info("the trace spool is written again")
        self._is_disk_failing = error is not None

    # ---- to the collector ---------------------------------------------------------------------------------------

    async def _send_for_ever(self) -> None:
        while True:
            self._has_work.clear()
            first = await self._first()
            if first:
                await self._send(first)
            else:
                await self._has_work.wait()

    async def _first(self) -> Sequence[Taken | _Queued]:
        """Return the oldest that wait, wherever they do."""
        async with self._turn:
            # What is in hand is older than all that is in the spool: that was empty then.
            if self._in_hand is None:
                if taken := await self._taken():
                    return taken
                if self._is_disk_failing and self._queue:
                    self._in_hand = self._queue.popleft()
                    self._queued_bytes -= self._in_hand.size_bytes
            return () if self._in_hand is None else (self._in_hand,)

    async def _taken(self) -> Sequence[Taken]:
        spool = self._spool
        if spool is None:
            return ()
        try:
            return await self._on_disk_thread(lambda: spool.take(self._now_s(), max_bytes=MAX_SENT_BYTES))
        except OSError as error:
            self._note_disk(error)
            return ()

    async def _send(self, first: Sequence[Taken | _Queued]) -> bool:
        """Send what waits as one request; say whether it is dealt with."""
        if first[0].at_s < self._now_s() - self._max_age_s:
            self._shed += first[0].spans
            await self._done(first[:1])
            return True
        spans = sum(one.spans for one in first)
        # A serialised message behind another is both in one: all that a request has is a repeated field.
        match await self._collector.export(b"".join([one.payload for one in first])):
            case Accepted(rejected):
                rejected = min(rejected, spans)
                self._forwarded += spans - rejected
                self._note_back()
                if rejected:
                    self._note_refused(rejected, "rejected in part")
                else:
                    self._is_refused = False
                await self._done(first)
                return True
            case Never() if len(first) > 1:
                return await self._send_apart(first)
            case Never(reason):
                self._note_back()
                self._note_refused(spans, reason)
                await self._done(first)
                return True
            case Later(reason, after_s):
                self._note_away(reason)
                await asyncio.sleep(max(after_s, self._backoff.next_delay_s()))
                return False
            case outcome:
                assert_never(outcome)

    async def _send_apart(self, first: Sequence[Taken | _Queued]) -> bool:
        """Send one by one what was refused together: one of them may have spoilt it for the others."""
        for one in first:
            if not await self._send((one,)):
                return False
        return True

    async def _done(self, first: Sequence[Taken | _Queued]) -> None:
        self._in_hand = None
        spool, taken = self._spool, [one for one in first if isinstance(one, Taken)]
        if spool is None or not taken:
            return
        try:
            await self._on_disk_thread(lambda: spool.done(*taken))
        except OSError as error:
            # It is sent once more after a restart, which "at least once" allows.
            self._note_disk(error)

    def _note_back(self) -> None:
        self._backoff.reset()
        if self._is_away:
            _log.info("the collector answers again")
        self._is_away = False

    def _note_away(self, reason: str) -> None:
        level = logging.DEBUG if self._is_away else logging.WARNING
        self._is_away = True
        _log.log(level, "the collector is away; spans wait for it", extra={"reason": peer_text(reason)})

    def _note_refused(self, spans: int, reason: str) -> None:
        self._refused += spans
        level = logging.DEBUG if self._is_refused else logging.WARNING
        self._is_refused = True
        _log.log(level, "the collector refused spans", extra={"spans": spans, "reason": peer_text(reason)})

    # ---- both ---------------------------------------------------------------------------------------------------

    def _now_s(self) -> float:
        return self._clock.now().timestamp()

    async def _on_disk_thread(self, step: Callable[[], Result]) -> Result:
        """Return what `step` does; it is over when this is, also when this is cancelled."""
        running = asyncio.get_running_loop().run_in_executor(self._disk, step)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            # Looked at, so that nobody is told of an exception that nobody saw.
            running.exception()
            raise
