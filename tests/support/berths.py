"""Models that take memory on paper only, and time of a virtual loop: for what brings them in and out.

memory = Memory(budget_bytes=100)
cat = memory.host("cat", 40, load_s=0.5)
answer = memory.ask(cat)                    held, loaded, answered
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from core.digest import Digest, digest_of
from core.errors import NanofleetError
from core.tensors import Array
from edge_agent.runtime.berth import Berth, Phase
from edge_agent.runtime.footprint import Footprint
from edge_agent.runtime.job import NEVER, Ran
from edge_agent.runtime.loader import Loader
from edge_agent.runtime.model import LoadedModel
from edge_agent.runtime.opening import Opened
from edge_agent.runtime.residency import ResidencyTerms
from edge_agent.runtime.session import RunTime
from edge_agent.runtime.threads import RunThreads
from edge_agent.settings import RuntimeSettings
from tests.support.edge_plane import echo_manifest
from tests.support.virtual_time import LoopClock, VirtualExecutor

CLOSE_S = 0.01


class FakeSession:
    def __init__(self, opening: "FakeOpening") -> None:
        self._opening = opening
        self._is_closed = False

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        assert not self._is_closed, "evicted in flight"
        return inputs

    def warm_up(self, *, max_batch: int) -> RunTime:
        return self._opening.run_time

    def close(self) -> None:
        assert not self._is_closed, "closed twice"
        self._is_closed = True
        self._opening.open_sessions -= 1


class FakeOpening:
    """What a berth opens; `failure` is raised instead, as long as it is set."""

    def __init__(self, footprint: Footprint, run_time: RunTime) -> None:
        self.footprint = footprint
        self.run_time = run_time
        self.takes_s = footprint.load_s
        self.failure: Exception | None = None
        self.open_sessions = self.loads = 0

    def __call__(self) -> Opened:
        if self.failure is not None:
            raise self.failure
        assert self.open_sessions == 0, "loaded twice at once"
        self.open_sessions += 1
        self.loads += 1
        return Opened(FakeSession(self), self.run_time, self.footprint.load_s, self.footprint.resident_bytes)


class _LoaderThread(Executor):
    """One thing after the other, each for as long as it says."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        loop = asyncio.get_running_loop()

        def end() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(work(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self._free_at_s = max(self._free_at_s, loop.time()) + getattr(work, "takes_s", CLOSE_S)
        loop.call_at(self._free_at_s, end)
        return future


class Asker:
    """Somebody's request: the batcher's Waiter."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()

    def is_waiting(self) -> bool:
        return not self.future.done()

    def settle(self, ran: Ran) -> None:
        self.future.set_result(ran)

    def fail(self, error: NanofleetError) -> None:
        self.future.set_exception(error)


class Memory:
    """A loader and what it hosts; what it accounts for is checked at every change."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        protect_s: float = 0.0,
        protect_loads: float = 0.0,
        max_wait_s: float = 30.0,
        available_bytes: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.most_taken_bytes = 0
        self.evicted: Counter[str] = Counter()
        self._openings: dict[Berth, FakeOpening] = {}
        self._phases: dict[Berth, Phase] = {}
        self._budget_bytes = budget_bytes
        self.loader = Loader(
            ResidencyTerms(budget_bytes, protect_s, protect_loads),
            clock=LoopClock(),
            max_wait_s=max_wait_s,
            available_bytes=available_bytes,
            on_change=self._look,
            thread=_LoaderThread(),
        )

    def host(
        self,
        name: str,
        resident_bytes: int,
        *,
        peak_bytes: int = 0,
        load_s: float = 0.5,
        run_s: float = 0.0,
        is_pinned: bool = False,
        version: int = 1,
    ) -> Berth:
        footprint = Footprint(resident_bytes, max(peak_bytes, resident_bytes), load_s)
        opening = FakeOpening(footprint, RunTime(run_s, run_s))
        manifest = echo_manifest(name, version=version, max_batch=1)
        model = LoadedModel(
            manifest,
            digest_named(name),
            None,
            run_time=opening.run_time,
            settings=RuntimeSettings(),
            clock=LoopClock(),
            threads=RunThreads(1, VirtualExecutor(run_s)) if run_s else None,
        )
        berth = Berth(model, opening, footprint, is_pinned=is_pinned)
        self._openings[berth] = opening
        self.loader.add(berth)
        return berth

    def opening(self, berth: Berth) -> FakeOpening:
        return self._openings[berth]

    def ask(self, berth: Berth, *, within_s: float = NEVER) -> "asyncio.Future[Ran]":
        """Ask as the data plane does; raises what refuses the request at once."""
        asker = Asker()
        deadline_s = asyncio.get_running_loop().time() + within_s
        berth.model.admit(deadline_s)
        berth.model.batcher.submit([np.zeros((1, 3), np.float32)], asker, deadline_s=deadline_s)
        return asker.future

    def resident(self) -> set[str]:
        return {berth.name for berth in self._openings if berth.phase is Phase.RESIDENT}

    def _look(self) -> None:
        taken_bytes = self.loader.taken_bytes
        self.most_taken_bytes = max(self.most_taken_bytes, taken_bytes)
        assert taken_bytes <= self._budget_bytes, "over the budget"
        for berth in self._openings:
            if berth.phase is Phase.COLD and self._phases.get(berth) not in (None, Phase.COLD, Phase.LOADING):
                self.evicted[berth.name] += 1
                assert not berth.is_pinned, "a pinned model was evicted"
            self._phases[berth] = berth.phase


def digest_named(name: str) -> Digest:
    return digest_of(name.encode())
