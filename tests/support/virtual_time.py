"""An event loop whose time passes at once when nothing is left to do: timers fire in order, nobody waits for them."""

import asyncio
import functools
import selectors
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec

from core.clock import SystemClock

_Parameters = ParamSpec("_Parameters")
# Real seconds; only a test that waits for another thread, or for ever, comes here.
_GIVE_UP_S = 10.0


class _JumpingSelector(selectors.SelectSelector):
    now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            events = super().select(_GIVE_UP_S)
            assert events, "the test waits for what never happens"
            return events
        events = super().select(0)
        if not events:
            self.now_s += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def pass_s(self, seconds: float) -> None:
        """Let time go by while something computes."""
        self._jumping.now_s += seconds


class LoopClock(SystemClock):
    """The running loop's time."""

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()


class VirtualExecutor(Executor):
    """Runs everything at once, side by side, and has the results after `takes_s` of the running loop's time."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s = takes_s
        self.running = self.most_running = 0

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.running += 1
        self.most_running = max(self.running, self.most_running)

        def end() -> None:
            self.running -= 1
            future.set_result(work(*args, **kwargs))

        asyncio.get_running_loop().call_later(self.takes_s, end)
        return future


def in_virtual_time(test: Callable[_Parameters, Awaitable[None]]) -> Callable[_Parameters, None]:
    """Run a coroutine test in a loop whose time is virtual."""

    @functools.wraps(test)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        async def main() -> None:
            await test(*args, **kwargs)

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(main())

    return run
