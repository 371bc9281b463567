"""Numbers for Prometheus: counters and histograms that are bumped where things happen, gauges that are read when asked.

    registry = Registry()                                    one per process, handed down from the composition root
    asked = registry.counter("nanofleet_requests", "Requests.", ("model",))
    asked.of("digits").inc()
    registry.gauge("nanofleet_queue_depth", "Requests that wait.", (), lambda: [((), pool.queued)])

`exposition` writes what a registry holds. Everything here is called in one thread, the event loop's. What is bumped on
the hot path is looked up once and kept: `inc` and `observe` cost 0.1 to 0.2 us (measured), of a request's 100.

Labels come from small sets of our own words; models are the exception, and nothing bounds how many a process sees in
its life. Beyond `max_children` a family counts everything new under `OTHER`. Names of counters have no `_total` here.
Formats: prometheus.io, "Exposition formats"; OpenMetrics 1.0.0. Names of histograms and their buckets: OpenTelemetry
semantic conventions 1.44, "." becoming "_" and the unit standing at the end.
"""

import re
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Generic, NamedTuple, Protocol, TypeVar

# The conventions' advice for durations of calls, messages and HTTP requests, in seconds.
CALL_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
# The same, and below: a small model answers in 0.02 to 2 ms, all of which would fall into the first of them.
STAGE_BUCKETS_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, *CALL_BUCKETS_S)
# Chosen: every model that a state may name, with a handful of outcomes each, some times over.
MAX_CHILDREN = 4096
OTHER = "other"

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Exemplar(NamedTuple):
    """One observation with the trace that tells its story; `at_s` is wall-clock time."""

    trace_id: str
    value: float
    at_s: float


class Sample(NamedTuple):
    """One line: the family's name with `suffix`, the values of its labels in their order, `le` of a bucket."""

    suffix: str
    values: tuple[str, ...]
    number: float
    le: float | None = None
    exemplar: Exemplar | None = None


class Instrument(Protocol):
    def samples(self, values: tuple[str, ...]) -> Iterable[Sample]: ...


class Counter:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0.0

    def inc(self, by: float = 1.0) -> None:
        self.count += by

    def samples(self, values: tuple[str, ...]) -> Iterable[Sample]:
        return [Sample("_total", values, self.count)]


class Histogram:
    """Counts by upper bound, inclusive, and the last exemplar of each."""

    __slots__ = ("_bounds", "_counts", "_exemplars", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: dict[int, Exemplar] = {}
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def remember(self, exemplar: Exemplar) -> None:
        """Keep the story of a value that was observed."""
        self._exemplars[bisect_left(self._bounds, exemplar.value)] = exemplar

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def total(self) -> float:
        """The sum of all values."""
        return self._sum

    def samples(self, values: tuple[str, ...]) -> Iterable[Sample]:
        bounds = (*self._bounds, float("inf"))
        running = accumulate(self._counts)
        buckets = [
            Sample("_bucket", values, number, le, self._exemplars.get(index))
            for index, (le, number) in enumerate(zip(bounds, running, strict=True))
        ]
        return [*buckets, Sample("_count", values, self.count), Sample("_sum", values, self._sum)]


@dataclass(frozen=True, slots=True)
class Description:
    name: str
    help: str
    kind: Kind
    labels: tuple[str, ...]

    @property
    def unit(self) -> str:
        """The unit at the end of the name, if any; OpenMetrics wants it said twice."""
        last = self.name.rpartition("_")[2]
        return last if last in {"seconds", "bytes", "ratio", "celsius"} else ""


T = TypeVar("T", bound=Instrument)
Reading = tuple[tuple[str, ...], float]


class Family(Generic[T]):
    """The instruments of one name, by the values of their labels."""

    def __init__(self, description: Description, make: Callable[[], T], *, max_children: int) -> None:
        self.description = description
        self._make = make
        self._max_children = max_children
        self._children: dict[tuple[str, ...], T] = {}

    def of(self, *values: str) -> T:
        """Return the instrument with these values, in the order of the labels; keep it where it is used often."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self.description.labels):
                raise ValueError(f"{self.description.name}: expected {self.description.labels}, got {values}")
            if len(self._children) >= self._max_children:
                values = (OTHER,) * len(values)
            child = self._children.setdefault(values, self._make())
        return child

    def items(self) -> Sequence[tuple[tuple[str, ...], T]]:
        return list(self._children.items())

    def samples(self) -> Iterable[Sample]:
        return [sample for values, child in self._children.items() for sample in child.samples(values)]


class _Readings:
    """A family whose numbers live elsewhere and are read when somebody asks."""

    def __init__(self, description: Description, read: Callable[[], Iterable[Reading]]) -> None:
        self.description = description
        self._read = read

    def samples(self) -> Iterable[Sample]:
        suffix = "_total" if self.description.kind is Kind.COUNTER else ""
        return [Sample(suffix, values, number) for values, number in self._read()]


class Described(Protocol):
    @property
    def description(self) -> Description: ...

    def samples(self) -> Iterable[Sample]: ...


class Registry:
    """Every family of one process, in the order in which they were made."""

    def __init__(self, *, max_children: int = MAX_CHILDREN) -> None:
        self._max_children = max_children
        self._families: dict[str, Described] = {}
        self._refreshers: list[Callable[[], Awaitable[None]]] = []

    def counter(self, name: str, help_: str, labels: tuple[str, ...] = ()) -> Family[Counter]:
        return self._add(
            Family(_described(name, help_, Kind.COUNTER, labels), Counter, max_children=self._max_children)
        )

    def histogram(
        self, name: str, help_: str, labels: tuple[str, ...] = (), *, bounds: Sequence[float]
    ) -> Family[Histogram]:
        description = _described(name, help_, Kind.HISTOGRAM, labels)
        return self._add(Family(description, lambda: Histogram(bounds), max_children=self._max_children))

    def gauge(self, name: str, help_: str, labels: tuple[str, ...], read: Callable[[], Iterable[Reading]]) -> None:
        """Have `read` asked, at every scrape, for the values of the labels and the number that belongs to them."""
        self._add(_Readings(_described(name, help_, Kind.GAUGE, labels), read))

    def tally(self, name: str, help_: str, labels: tuple[str, ...], read: Callable[[], Iterable[Reading]]) -> None:
        """Have `read` asked for numbers that only grow, and are counted somewhere else."""
        self._add(_Readings(_described(name, help_, Kind.COUNTER, labels), read))

    def before_scrape(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """Have `refresh` awaited before each scrape, for what cannot be read at once."""
        self._refreshers.append(refresh)

    async def scraped(self) -> Sequence[Described]:
        """Return the families as they are to be written, once what they read is fresh."""
        for refresh in self._refreshers:
            await refresh()
        return self.families()

    def families(self) -> Sequence[Described]:
        return tuple(self._families.values())

    def _add(self, family: "_Added") -> "_Added":
        name = family.description.name
        if name in self._families:
            raise ValueError(f"metric {name}: registered twice; hand the first one down")
        self._families[name] = family
        return family


_Added = TypeVar("_Added", bound=Described)


def _described(name: str, help_: str, kind: Kind, labels: tuple[str, ...]) -> Description:
    for word in (name, *labels):
        if _NAME.fullmatch(word) is None or word == "le":
            raise ValueError(f"metric {name}: expected lower-case words joined by _, got {word!r}")
    return Description(name, help_, kind, labels)
