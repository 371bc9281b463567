"""Who is next: the bounded queue of one model, urgent before patient, fair between clients, soonest deadline first.

    level (priority) ─▶ flow (client) ─▶ request (deadline)

- The most urgent level goes first. So that no level starves, every `MAX_IN_A_ROW` requests of the first level are
  followed by one of the level behind it that has gone without for longest, if any waits.
- Within a level clients take turns by start-time fair queueing, with rows as cost: a client's next request starts, in
  virtual time, where its last one ended, or at the level's time if that is later; the earliest start goes next. While
  two clients wait, neither gets more than one request of rows ahead of the other. Goyal, Vin and Cheng, "Start-time
  Fair Queueing", SIGCOMM 1996, section 2 (all weights 1).
- Within a flow the soonest deadline goes first (Liu and Layland, 1973), arrival deciding between equals.
- When it is full a newcomer takes the place of one that deserves it less: the last in turn of the heaviest client in
  the least urgent level, or, in the newcomer's own level, of a client that has more here than the newcomer's.

Decides only: no clock, no waiting. An entry costs a bisection and a heap move.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

from edge_agent.runtime.job import NEVER, Job

# A request that names no priority (0) stands in the middle, so that others can be before and behind it.
DEFAULT_PRIORITY = 50
# Chosen: the levels behind the first keep about 6 % of the runs between them.
MAX_IN_A_ROW = 16
# Clients that were served lately and have nothing here now; chosen: as many as may wait by default.
_MAX_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class QueueBounds:
    max_requests: int = 1024
    max_bytes: int = 64 << 20


class FairQueue:
    def __init__(self, bounds: QueueBounds) -> None:
        self._bounds = bounds
        self._levels: dict[int, _Level] = {}
        # Sorted, of the levels where somebody waits.
        self._ranks: list[int] = []
        self._arrived = 0
        self._taken = 0
        self._in_a_row = 0
        self._count = 0
        self.rows = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        return (job for level in self._levels.values() for flow in level.flows.values() for _, _, job in flow.jobs)

    def add(self, job: Job) -> None:
        """Queue `job`, for which there is room."""
        self._arrived += 1
        job.number = self._arrived
        self._insert(job)

    def make_room_for(self, job: Job) -> Sequence[Job] | None:
        """Return those who gave up their places for `job`, or None, with nobody gone, when it is to be refused."""
        if job.size_bytes > self._bounds.max_bytes:
            return None
        victims: list[Job] = []
        while not self._has_room_for(job):
            victim = self._least_deserving(job)
            if victim is None:
                for each in victims:
                    self._insert(each)
                return None
            self.remove(victim)
            victims.append(victim)
        return victims

    def first(self) -> Job | None:
        """Return who is next, and leave it there."""
        return self._next_level().first() if self._ranks else None

    def pop(self) -> Job:
        """Take who is next."""
        level = self._next_level()
        self._taken += 1
        self._in_a_row = self._in_a_row + 1 if level.rank == self._ranks[0] and len(self._ranks) > 1 else 0
        level.last_turn = self._taken
        job = level.pop()
        self._note_gone(level, job)
        return job

    def remove(self, job: Job) -> None:
        """Free the place of `job`, which is queued."""
        level = self._levels[_rank(job)]
        level.remove(job)
        self._note_gone(level, job)

    def expired(self, now_s: float) -> Sequence[Job]:
        """Take all whose deadline has passed."""
        passed = [
            job
            for level in self._levels.values()
            for flow in level.flows.values()
            if flow.jobs[0][0] <= now_s
            for deadline_s, _, job in flow.jobs
            if deadline_s <= now_s
        ]
        for job in passed:
            self.remove(job)
        return passed

    def soonest_deadline_s(self) -> float:
        return min((flow.jobs[0][0] for each in self._levels.values() for flow in each.flows.values()), default=NEVER)

    def rows_ahead_of(self, job: Job) -> int:
        """Return about how many rows would run before those of `job`, if it were queued now."""
        rank = _rank(job)
        urgent = patient = 0
        for other in self._ranks:
            if other < rank:
                urgent += self._levels[other].rows
            elif other > rank:
                patient += self._levels[other].rows
        level = self._levels.get(rank)
        ahead = urgent + (0 if level is None else level.rows_ahead_of(job))
        return ahead + min(patient, ahead // MAX_IN_A_ROW)

    def _has_room_for(self, job: Job) -> bool:
        return self._count < self._bounds.max_requests and self.size_bytes + job.size_bytes <= self._bounds.max_bytes

    def _insert(self, job: Job) -> None:
        rank = _rank(job)
        level = self._levels.get(rank)
        if level is None:
            level = self._levels[rank] = _Level(rank, last_turn=self._taken)
            insort(self._ranks, rank)
        level.add(job)
        job.is_queued = True
        self._count += 1
        self.rows += job.rows
        self.size_bytes += job.size_bytes

    def _note_gone(self, level: "_Level", job: Job) -> None:
        job.is_queued = False
        self._count -= 1
        self.rows -= job.rows
        self.size_bytes -= job.size_bytes
        if not level.flows:
            del self._levels[level.rank]
            self._ranks.remove(level.rank)

    def _next_level(self) -> "_Level":
        if len(self._ranks) > 1 and self._in_a_row >= MAX_IN_A_ROW:
            return min((self._levels[rank] for rank in self._ranks[1:]), key=lambda level: level.last_turn)
        return self._levels[self._ranks[0]]

    def _least_deserving(self, job: Job) -> Job | None:
        if not self._ranks or self._ranks[-1] < _rank(job):
            return None
        level = self._levels[self._ranks[-1]]
        is_full = self._count >= self._bounds.max_requests
        heaviest = max(level.flows.values(), key=lambda flow: len(flow.jobs) if is_full else flow.size_bytes)
        if level.rank == _rank(job):
            own = level.flows.get(job.client)
            own_load = 0 if own is None else len(own.jobs) if is_full else own.size_bytes
            load = len(heaviest.jobs) if is_full else heaviest.size_bytes
            if load <= own_load + (1 if is_full else job.size_bytes):
                return None
        return heaviest.jobs[-1][2]


class _Flow:
    """What one client has in a level; `start` is the virtual time at which its next request starts."""

    __slots__ = ("client", "entry", "jobs", "rows", "size_bytes", "start")

    def __init__(self, client: str, start: float) -> None:
        self.client = client
        self.start = start
        # Sorted: (deadline, number, job).
        self.jobs: list[tuple[float, int, Job]] = []
        self.rows = 0
        self.size_bytes = 0
        # Its place in the level's heap.
        self.entry: tuple[float, int, _Flow]


class _Level:
    """The flows of one priority, in a heap by virtual start; a flow is here only while it has a request."""

    def __init__(self, rank: int, *, last_turn: int) -> None:
        self.rank = rank
        self.last_turn = last_turn
        self.flows: dict[str, _Flow] = {}
        self.rows = 0
        self._heap: list[tuple[float, int, _Flow]] = []
        self._entries = 0
        self._time = 0.0
        # Where those ended that have nothing here now: who comes back at once does not overtake.
        self._ended: dict[str, float] = {}

    def first(self) -> Job:
        return self._heap[0][2].jobs[0][2]

    def add(self, job: Job) -> None:
        flow = self.flows.get(job.client)
        if flow is None:
            flow = _Flow(job.client, max(self._time, self._ended.pop(job.client, 0.0)))
            self.flows[job.client] = flow
            heappush(self._heap, self._entry(flow))
        insort(flow.jobs, (job.deadline_s, job.number, job))
        flow.rows += job.rows
        flow.size_bytes += job.size_bytes
        self.rows += job.rows

    def pop(self) -> Job:
        flow = self._heap[0][2]
        job = flow.jobs.pop(0)[2]
        self._time = flow.start
        flow.start += job.rows
        self._deduct(flow, job)
        if flow.jobs:
            heapreplace(self._heap, self._entry(flow))
        else:
            heappop(self._heap)
            self._forget(flow)
        return job

    def remove(self, job: Job) -> None:
        flow = self.flows[job.client]
        del flow.jobs[bisect_left(flow.jobs, (job.deadline_s, job.number))]
        self._deduct(flow, job)
        if not flow.jobs:
            self._heap.remove(flow.entry)
            heapify(self._heap)
            self._forget(flow)

    def rows_ahead_of(self, job: Job) -> int:
        """Its own client's with a sooner deadline, and of the others as many each, if they have them."""
        own = self.flows.get(job.client)
        if own is None:
            return min(self.rows, job.rows * len(self.flows))
        before = bisect_left(own.jobs, (job.deadline_s, NEVER)) * own.rows // len(own.jobs)
        return before + min(self.rows - own.rows, (before + job.rows) * (len(self.flows) - 1))

    def _entry(self, flow: _Flow) -> tuple[float, int, _Flow]:
        self._entries += 1
        flow.entry = (flow.start, self._entries, flow)
        return flow.entry

    def _deduct(self, flow: _Flow, job: Job) -> None:
        flow.rows -= job.rows
        flow.size_bytes -= job.size_bytes
        self.rows -= job.rows

    def _forget(self, flow: _Flow) -> None:
        del self.flows[flow.client]
        # It names the flow, which names it.
        del flow.entry
        if flow.start <= self._time:
            return
        self._ended[flow.client] = flow.start
        if len(self._ended) > _MAX_REMEMBERED:
            ahead = [(client, end) for client, end in self._ended.items() if end > self._time]
            self._ended = dict(ahead[-_MAX_REMEMBERED // 2 :])


def _rank(job: Job) -> int:
    return job.priority or DEFAULT_PRIORITY
