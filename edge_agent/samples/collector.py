"""Hard examples on their way from the data plane to the disk.

`offer` is called in the loop for each one: it looks at the settings, asks the rules and puts what they choose into a
bounded queue. Everything else happens on the disk's thread. What cannot be kept is counted by its reason, and nobody
who waits for an answer notices: a disk that is full or read-only costs samples, no requests.
"""

import asyncio
import errno
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from core.clock import Clock
from core.digest import Digest
from core.errors import DiskFull, NanofleetError, TooLarge
from core.samples import MAX_SAMPLE_BYTES, NO_SAMPLES, SampleCounts
from edge_agent.cascade.policy import Privacy
from edge_agent.hard_examples import HardExample
from edge_agent.samples.made import edge_label, made_sample, size_of
from edge_agent.samples.rules import Candidate, Keep, Refusal, Selection
from edge_agent.samples.store import SampleStore

# Chosen: a burst of escalations while the disk is busy; what is beyond it is not worth the memory.
MAX_QUEUED = 64
MAX_QUEUED_BYTES = 8 << 20
# Chosen: what ages out, or is purged by a person, shows within a minute.
TIDY_INTERVAL_S = 60.0
# Derived: an hour's examples of as many models as are remembered by the rules, at most the default limit of each.
_MAX_TICKETS = 1 << 14

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Permissions:
    """Of which models samples may be kept, and whether also of requests that may not leave the site."""

    keeps: Callable[[str], bool]
    keeps_site: bool = False


@dataclass(frozen=True, slots=True)
class _Chosen:
    example: HardExample
    label: int | None
    keep: Keep
    size_bytes: int


class Collector:
    """Implements `edge_agent.hard_examples.HardExamples`; keep `run` and `tidy` running."""

    def __init__(
        self, store: SampleStore, selection: Selection, permissions: Permissions, *, disk: Executor, clock: Clock
    ) -> None:
        self._store = store
        self._selection = selection
        self.permissions = permissions
        self._disk = disk
        self._clock = clock
        self._queue: deque[_Chosen] = deque()
        self._queued_bytes = 0
        self._has_work = asyncio.Event()
        # Which sample each ticket of the rules became, for as long as they may replace it.
        self._tickets: OrderedDict[int, Digest] = OrderedDict()
        self._failures: set[str] = set()
        self.margin = selection.margin
        self.stored = 0
        # By reason: a word of the rules, `site`, `queue`, `too_large`, `disk_full` or `disk`.
        self.dropped: Counter[str] = Counter()
        # As of the last look at the disk.
        self.counts: SampleCounts = NO_SAMPLES

    def offer(self, example: HardExample) -> None:
        if example.privacy is Privacy.DEVICE or not self.permissions.keeps(example.model.manifest.model):
            return
        if (chosen := self._chosen(example)) is not None:
            self._queue.append(chosen)
            self._queued_bytes += chosen.size_bytes
            self._has_work.set()

    async def run(self) -> None:
        """Bring what is queued to the disk, one at a time; for ever."""
        while True:
            await self._has_work.wait()
            while self._queue:
                chosen = self._queue.popleft()
                self._queued_bytes -= chosen.size_bytes
                await self._store_one(chosen)
            self._has_work.clear()

    async def tidy(self) -> None:
        """Keep the store within its bounds of age and its counts true; for ever."""
        while True:
            await self.look()
            await asyncio.sleep(TIDY_INTERVAL_S)

    async def look(self) -> None:
        """Look once at what is on the disk."""
        try:
            await self._on_disk(partial(self._store.tidy, now=self._clock.now()))
        except OSError as error:
            self._warn("disk", error)
        await self._count()

    @property
    def damaged(self) -> int:
        return self._store.damaged

    @property
    def shed(self) -> int:
        return self._store.shed

    # ---- inside ------------------------------------------------------------------------------------------------

    def _chosen(self, example: HardExample) -> _Chosen | None:
        """Return the example if it is to be kept; else count why not."""
        size_bytes = size_of(example)
        obstacle = self._obstacle(example, size_bytes)
        cascade = example.model.cascade
        if obstacle or cascade is None:
            self.dropped[obstacle or "no_cascade"] += 1
            return None
        label = edge_label(example, cascade)
        candidate = Candidate(example.model.manifest.model, label, example.verdict.confidence, cascade.threshold)
        choice = self._selection.consider(candidate, now_s=self._clock.monotonic_s())
        if isinstance(choice, Refusal):
            self.dropped[choice.value] += 1
            return None
        return _Chosen(example, label, choice, size_bytes)

    def _obstacle(self, example: HardExample, size_bytes: int) -> str:
        """Return why an example cannot be kept, whatever the rules say; before them, which count what they choose."""
        if example.privacy is not Privacy.ANY and not self.permissions.keeps_site:
            return "site"
        if size_bytes > min(MAX_SAMPLE_BYTES, MAX_QUEUED_BYTES):
            return "too_large"
        is_full = len(self._queue) >= MAX_QUEUED or self._queued_bytes + size_bytes > MAX_QUEUED_BYTES
        return "queue" if is_full else ""

    async def _store_one(self, chosen: _Chosen) -> None:
        try:
            digest = await self._on_disk(partial(self._put, chosen))
        except TooLarge:
            self.dropped["too_large"] += 1
        except DiskFull as error:
            self._drop("disk_full", error)
        except OSError as error:
            self._drop("disk_full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "disk", error)
        else:
            self.stored += 1
            self._failures.clear()
            self._remember(chosen.keep.ticket, digest)
            await self._count()

    def _put(self, chosen: _Chosen) -> Digest:
        """Store a sample, then remove the one whose place it takes; on the disk's thread."""
        now = self._clock.now()
        view, content = made_sample(chosen.example, label=chosen.label, taken_at=now)
        kept = self._store.put(view, content, now=now)
        replaced = None if chosen.keep.replaces is None else self._tickets.get(chosen.keep.replaces)
        if replaced is not None and replaced != kept.digest:
            self._store.remove(replaced)
        return kept.digest

    def _remember(self, ticket: int, digest: Digest) -> None:
        self._tickets[ticket] = digest
        if len(self._tickets) > _MAX_TICKETS:
            self._tickets.popitem(last=False)

    async def _count(self) -> None:
        self.counts = await self._on_disk(self._store.counts)

    def _drop(self, reason: str, error: NanofleetError | OSError) -> None:
        self.dropped[reason] += 1
        self._warn(reason, error)

    def _warn(self, reason: str, error: NanofleetError | OSError) -> None:
        """Warn of the first failure of its kind since one was stored."""
        level = logging.DEBUG if reason in self._failures else logging.WARNING
        self._failures.add(reason)
        _log.log(level, "hard examples cannot be kept", extra={"reason": reason, "error": str(error)})

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)
