"""Which models stay in memory: whether one more has room, and who leaves for it. Pure.

The rule, in this order:

1. What is loaded, with what is being loaded at its peak, never takes more than the budget. Room is made first.
2. Pinned models never leave. One that has no room beside them is refused for good.
3. A model that serves a request, or has some waiting, does not leave while others would do.
4. Of those who may leave, the ones go whose bytes are worth least: worth = frequency x load time / size, the expected
   waiting that a byte saves. Nobody goes who need not.
5. When one of those was only just loaded, the newcomer waits: for `protect_s`, or for `protect_loads` times what the
   load took if that is longer, so that a place serves for half of the time at least, however badly the models fit.
   Nobody worth more leaves instead. Who has waited for as long as its own load protects goes first all the same, oldest
   first, over busy ones too if it must: those finish what they have before they leave. So two that do not fit together
   take turns, and neither starves.

Worth is that of GreedyDual-Size-Frequency (L. Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Labs TR 98-69, 1998; after P. Cao and S. Irani, "Cost-Aware WWW Proxy
Caching Algorithms", USITS 1997), with one change: there, what left is forgotten, and who stays ages by an inflation
that each eviction raises. We see every request, of models out of memory too, so frequency itself ages: it halves with
every `half_life_s`. In simulation (20 models, 100 MB, Zipf 1.0) that is 59.7 % hits to 58.5 % of the original.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Chosen: a model whose users went home is cheaper than a busy one within minutes.
HALF_LIFE_S = 120.0


@dataclass(frozen=True, slots=True)
class ResidencyTerms:
    budget_bytes: int
    protect_s: float = 0.1
    protect_loads: float = 1.0

    def protection_s(self, load_s: float) -> float:
        return max(self.protect_s, self.protect_loads * load_s)


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that takes memory: loaded, being loaded (`size_bytes` is its peak then) or leaving."""

    name: str
    size_bytes: int
    load_s: float
    frequency: float = 0.0
    loaded_at_s: float = 0.0
    is_pinned: bool = False
    is_busy: bool = False
    is_leaving: bool = False

    @property
    def worth(self) -> float:
        return self.frequency * self.load_s / max(1, self.size_bytes)


@dataclass(frozen=True, slots=True)
class Need:
    """Who wants to come in: `peak_bytes` while it is being loaded."""

    name: str
    peak_bytes: int
    load_s: float
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Admit:
    """There is room once those of `evicting` have left."""

    evicting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """There will be no room."""

    reason: str


Room = Admit | Wait | Refuse


def make_room(
    need: Need,
    residents: Sequence[Resident],
    terms: ResidencyTerms,
    *,
    now_s: float,
    available_bytes: int | None = None,
) -> Room:
    """Say whether `need` may come in. `available_bytes`: what the machine leaves now, if that is known."""
    taken_bytes = sum(resident.size_bytes for resident in residents)
    pinned_bytes = sum(resident.size_bytes for resident in residents if resident.is_pinned)
    if need.peak_bytes + pinned_bytes > terms.budget_bytes:
        return Refuse(_too_large(need, pinned_bytes, terms))
    limit_bytes = terms.budget_bytes
    if available_bytes is not None:
        limit_bytes = min(limit_bytes, taken_bytes + max(0, available_bytes))
    missing_bytes = need.peak_bytes - (limit_bytes - taken_bytes)
    if missing_bytes <= 0:
        return Admit()
    missing_bytes -= sum(resident.size_bytes for resident in residents if resident.is_leaving)
    if missing_bytes <= 0:
        return Wait("others are leaving")
    return _choose(need, residents, terms, now_s=now_s, missing_bytes=missing_bytes)


def _choose(
    need: Need, residents: Sequence[Resident], terms: ResidencyTerms, *, now_s: float, missing_bytes: int
) -> Room:
    has_waited = need.waited_s >= terms.protection_s(need.load_s)
    movable = [resident for resident in residents if not (resident.is_pinned or resident.is_leaving)]
    idle = [resident for resident in movable if not resident.is_busy]
    for candidates in (idle, movable) if has_waited else (idle,):
        if sum(resident.size_bytes for resident in candidates) < missing_bytes:
            continue
        going = _least_worth(candidates, missing_bytes)
        if has_waited or all(now_s - one.loaded_at_s >= terms.protection_s(one.load_s) for one in going):
            return Admit(tuple(one.name for one in going))
    if has_waited:
        return Wait(f"{missing_bytes} bytes of memory are missing on this machine")
    return Wait("the others are busy or were just loaded")


def _least_worth(candidates: Iterable[Resident], missing_bytes: int) -> Sequence[Resident]:
    going: list[Resident] = []
    freed_bytes = 0
    for resident in sorted(candidates, key=lambda resident: (resident.worth, resident.loaded_at_s)):
        if freed_bytes >= missing_bytes:
            break
        going.append(resident)
        freed_bytes += resident.size_bytes
    # The last one may have made some of those before it superfluous; the worthiest stay.
    for resident in reversed(going[:-1]):
        if freed_bytes - resident.size_bytes >= missing_bytes:
            going.remove(resident)
            freed_bytes -= resident.size_bytes
    return going


def _too_large(need: Need, pinned_bytes: int, terms: ResidencyTerms) -> str:
    beside = f" beside {pinned_bytes} bytes of pinned models" if pinned_bytes else ""
    return (
        f"expected at most {terms.budget_bytes - pinned_bytes} bytes of memory while it loads{beside}, it needs "
        f"{need.peak_bytes}; raise [residency] budget_bytes, pin less or deploy a smaller variant"
    )


class Frequencies:
    """How often each model was asked lately: counts that halve with every half-life."""

    def __init__(self, *, half_life_s: float = HALF_LIFE_S, now_s: float) -> None:
        self._half_life_s = half_life_s
        self._at_s = now_s
        self._counts: dict[str, float] = {}

    def add(self, requests: dict[str, int], *, now_s: float) -> None:
        """Take note of what was asked since the last time."""
        kept = 0.5 ** (max(0.0, now_s - self._at_s) / self._half_life_s)
        self._at_s = now_s
        self._counts = {name: count * kept for name, count in self._counts.items()}
        for name, count in requests.items():
            self._counts[name] = self._counts.get(name, 0.0) + count

    def of(self, name: str) -> float:
        return self._counts.get(name, 0.0)

    def forget(self, name: str) -> None:
        self._counts.pop(name, None)
