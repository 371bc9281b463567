"""Brings models into memory and out of it, one at a time, outside of every request's path.

    ask (a request to a cold model) ─┐
    bring_in (a new variant, by hand)┴▶ wants, oldest first ─▶ room? ─▶ evict: drain, close ─▶ open on a thread ─▶ warm

`residency` decides; this does. One task works on the wants, so nothing is ever loaded twice at once, and the budget has
one writer. What a model takes counts at its peak from before its load, and until after its session is closed.

Who leaves is drained first: what came before is answered, what comes later is held for its next load. A load that fails
is tried again by the next request after a back-off; what waited for it is told why.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import TypeVar

from core.clock import Clock
from core.errors import Forbidden, InternalError, ModelNotReady, NanofleetError, TooLarge, Unavailable
from edge_agent.runtime.batcher import Batcher
from edge_agent.runtime.berth import Berth, LoadCounts, Phase, Want
from edge_agent.runtime.opening import Opened, close_model
from edge_agent.runtime.residency import Admit, Refuse, ResidencyTerms, Wait
from edge_agent.runtime.rooms import Rooms

_log = logging.getLogger(__name__)

T = TypeVar("T")
# Chosen: nothing tells that a model has become idle, so who waits for room looks again.
LOOK_S = 0.02


class _Unwanted(ModelNotReady):
    """It was unloaded before its turn came."""


class Loader:
    """`available_bytes` says what the machine has left for models now; None: it does not tell."""

    def __init__(
        self,
        terms: ResidencyTerms,
        *,
        clock: Clock,
        max_wait_s: float = 30.0,
        available_bytes: Callable[[], int | None] = lambda: None,
        on_change: Callable[[], None] = lambda: None,
        thread: Executor | None = None,
    ) -> None:
        """`thread` opens and closes one model at a time; None: one of its own."""
        self.counts = LoadCounts()
        self._clock = clock
        self._max_wait_s = max_wait_s
        self._available_bytes = available_bytes
        self._on_change = on_change
        self._rooms = Rooms(terms, patience_s=max_wait_s / 2, clock=clock)
        self._numbers = count(1)
        self._wants: dict[Berth, Want] = {}
        self._changed = asyncio.Event()
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="model-loader")
        self._is_stopped = False
        self._work: asyncio.Task[None] | None = None
        self._loading: tuple[Berth, float] | None = None
        self._leaving: dict[Berth, asyncio.Task[None]] = {}

    @property
    def taken_bytes(self) -> int:
        """What models take now, one that is being loaded at its peak."""
        return sum(berth.taken_bytes for berth in self._rooms.berths.values())

    def add(self, berth: Berth) -> None:
        """Take on a variant that is out of memory, or, if it was opened elsewhere, in it for good."""
        berth.key = f"{berth.name}#{next(self._numbers)}"
        self._rooms.berths[berth.key] = berth
        if berth.open is None:
            berth.phase = Phase.RESIDENT
        else:
            berth.model.tell_when_cold(partial(self.ask, berth))

    def ask(self, berth: Berth, deadline_s: float) -> None:
        """Want `berth` in memory because a request came that may wait until `deadline_s`.

        Raises:
            ModelNotReady: it will not be there in time, or not at all.
        """
        now_s = self._clock.monotonic_s()
        self.counts.cold_requests += 1
        try:
            self._require_hope(berth, now_s)
            self._want(berth)
            expected_s = self._expected_s(berth, now_s)
            if now_s + expected_s > deadline_s:
                raise ModelNotReady(
                    f"model {berth.name}: is not in memory, loading it takes {expected_s:.3f} s, longer than the "
                    "request may wait; try again later"
                ).after(expected_s)
        except ModelNotReady:
            self.counts.refused_requests += 1
            raise

    def _require_hope(self, berth: Berth, now_s: float) -> None:
        if berth.is_parked:
            raise ModelNotReady(f"model {berth.name}: was unloaded by hand; load it through the repository first")
        if berth.replaced_by is not None:
            wait_s = berth.replaced_by.footprint.load_s
            raise ModelNotReady(f"model {berth.name}: is being replaced; try again later").after(wait_s)
        if now_s < berth.retry_at_s:
            raise ModelNotReady(f"model {berth.name}: could not be loaded: {berth.problem}").after(
                berth.retry_at_s - now_s
            )

    async def bring_in(self, berth: Berth, *, replaces: Berth | None = None) -> None:
        """Return once `berth` is in memory.

        Args:
            replaces: the variant whose place it takes; it goes first only where the budget has no room for both.

        Raises:
            TooLarge: the budget will never have room for it.
            ModelNotReady: there was no room for `max_wait_s`.
            NanofleetError: it cannot be loaded.
        """
        while berth.phase is not Phase.RESIDENT:
            want = self._want(berth)
            want.replaces = replaces
            arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            want.waiters.append(arrived)
            self._changed.set()
            await arrived

    async def keep(self, berth: Berth) -> None:
        """Load by hand, and never evict until `park`. Raises what `bring_in` raises."""
        was_parked, berth.is_parked = berth.is_parked, False
        berth.retry_at_s = 0.0
        try:
            await self.bring_in(berth)
        except NanofleetError:
            berth.is_parked = was_parked
            raise
        berth.is_kept = True

    async def park(self, berth: Berth) -> None:
        """Unload by hand, for as long as nobody loads it.

        Raises:
            Forbidden: it is pinned.
        """
        if berth.is_pinned or berth.open is None:
            raise Forbidden(f"model {berth.name}: is pinned in this agent's settings; take that back first")
        berth.is_kept, berth.is_parked = False, True
        while berth.is_parked and (berth.phase is not Phase.COLD or berth in self._wants):
            if berth.phase is Phase.RESIDENT:
                self._evict(berth)
            await self._look_again()
        berth.model.refuse_held("was unloaded by hand")

    async def retire(self, berth: Berth, *, drain_timeout_s: float) -> None:
        """Let `berth` finish what it has, for at most `drain_timeout_s`, and forget it."""
        berth.is_gone = True
        if berth.phase is Phase.RESIDENT:
            self._evict(berth, drain_timeout_s=drain_timeout_s, is_for_others=False)
        if berth in self._leaving:
            await asyncio.shield(self._leaving[berth])
        berth.model.batcher.close()
        if berth.phase is Phase.COLD:
            self._rooms.berths.pop(berth.key, None)
        self._changed.set()

    def discard(self, berth: Berth) -> None:
        """Forget a variant that did not come to serve."""
        berth.is_gone = True
        berth.model.batcher.close()
        if berth.phase is Phase.COLD:
            self._rooms.berths.pop(berth.key, None)

    async def stop(self) -> None:
        """Load nothing more; a load under way is finished by its thread, and dropped."""
        self._is_stopped = True
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    def close(self) -> None:
        """Let the thread go, once every variant is retired."""
        self._thread.shutdown(wait=False)

    # ---- the work ----------------------------------------------------------------------------------------------

    def _want(self, berth: Berth) -> Want:
        want = self._wants.get(berth)
        if want is None:
            want = self._wants[berth] = Want(berth, self._clock.monotonic_s())
        if (self._work is None or self._work.done()) and not self._is_stopped:
            self._work = asyncio.get_running_loop().create_task(self._serve_wants(), name="model-loader")
        return want

    async def _serve_wants(self) -> None:
        while self._wants:
            want = next(iter(self._wants.values()))
            error = await self._try(want)
            del self._wants[want.berth]
            if error is not None:
                self._failed(want, error)
            for waiter in want.waiters:
                if waiter.done():
                    continue
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)
            self._tell()

    async def _try(self, want: Want) -> NanofleetError | None:
        try:
            await self._serve(want)
        except NanofleetError as error:
            return error
        except OSError as error:
            return Unavailable(f"disk: {error.strerror or error}")
        except MemoryError:
            return Unavailable("the machine is out of memory")
        except Exception as error:
            # The root of a load: a defect that one model brings out must not stop the others.
            _log.exception("a load failed unexpectedly", extra={"model": want.berth.name})
            return InternalError(f"{type(error).__name__}: {error}")
        return None

    async def _serve(self, want: Want) -> None:
        berth = want.berth
        await self._have_room(want)
        assert berth.open is not None, "who cannot be loaded is never wanted"
        berth.phase, berth.taken_bytes = Phase.LOADING, berth.footprint.peak_bytes
        self._loading = berth, self._clock.monotonic_s()
        self._tell()
        try:
            opened = await self._on_thread(berth.open)
        except BaseException:
            berth.phase, berth.taken_bytes = Phase.COLD, 0
            raise
        finally:
            self._loading = None
        await self._seat(berth, opened)

    async def _have_room(self, want: Want) -> None:
        while not (want.berth.is_gone or want.berth.is_parked):
            if want.berth.phase is Phase.COLD:
                room = self._rooms.room_for(want, available_bytes=self._available_bytes())
                match room:
                    case Admit(evicting=()):
                        return
                    case Admit(evicting=keys):
                        for key in keys:
                            self._evict(self._rooms.berths[key])
                    case Refuse(reason=reason):
                        raise TooLarge(f"model {want.berth.name}: {reason}")
                    case Wait(reason=reason):
                        self._require_patience(want, reason)
            await self._look_again()
        raise _Unwanted(f"model {want.berth.name}: was unloaded; try again later")

    def _require_patience(self, want: Want, reason: str) -> None:
        waited_s = self._clock.monotonic_s() - want.since_s
        if waited_s >= self._max_wait_s:
            raise ModelNotReady(f"model {want.berth.name}: no room in memory for {waited_s:.1f} s: {reason}")

    async def _seat(self, berth: Berth, opened: Opened) -> None:
        if berth.is_gone:
            await self._on_thread(partial(close_model, opened.session))
            berth.phase, berth.taken_bytes = Phase.COLD, 0
            self._rooms.berths.pop(berth.key, None)
            return
        reserved_bytes = berth.taken_bytes
        berth.correct(opened)
        # What it took more than was made room for counts from its next load on.
        berth.phase, berth.taken_bytes = Phase.RESIDENT, min(berth.footprint.resident_bytes, reserved_bytes)
        berth.session, berth.loaded_at_s = opened.session, self._clock.monotonic_s()
        berth.problem = ""
        berth.backoff.reset()
        self.counts.loads += 1
        self.counts.load_s += opened.load_s
        berth.model.warm(opened.session.run, opened.run_time)
        _log.debug("model is in memory", extra={"model": berth.name, "load_s": round(opened.load_s, 4)})

    def _evict(self, berth: Berth, *, drain_timeout_s: float | None = None, is_for_others: bool = True) -> None:
        berth.phase = Phase.LEAVING
        before = berth.model.cool(partial(self.ask, berth))
        self.counts.evictions += is_for_others
        self._leaving[berth] = asyncio.get_running_loop().create_task(
            self._leave(berth, before, drain_timeout_s), name=f"unload {berth.name}"
        )

    async def _leave(self, berth: Berth, before: Batcher, drain_timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(drain_timeout_s):
                await before.drain()
        except TimeoutError:
            _log.warning("a model did not finish its requests in time", extra={"model": berth.name})
        finally:
            before.close()
        # What runs now ends by itself, and its session is not touched before.
        await before.drain()
        berth.model.forget(before)
        session, berth.session = berth.session, None
        if session is not None:
            await self._on_thread(partial(close_model, session))
        berth.phase, berth.taken_bytes = Phase.COLD, 0
        del self._leaving[berth]
        self._tell()

    def _failed(self, want: Want, error: NanofleetError) -> None:
        berth = want.berth
        if want.replaces is not None:
            want.replaces.replaced_by = None
        if isinstance(error, _Unwanted):
            return
        delay_s = berth.backoff.next_delay_s()
        berth.problem, berth.retry_at_s = str(error), self._clock.monotonic_s() + delay_s
        self.counts.failed_loads += 1
        _log.warning("a model could not be loaded", extra={"model": berth.name, "reason": str(error)[:256]})
        berth.model.refuse_held(f"could not be loaded: {error}", after_s=delay_s)

    def _expected_s(self, berth: Berth, now_s: float) -> float:
        """Return how long it takes until `berth` is in memory, as far as loads were measured."""
        expected_s = 0.0
        for other in self._wants:
            load_s = other.footprint.load_s
            if self._loading is not None and self._loading[0] is other:
                load_s = max(0.0, load_s - (now_s - self._loading[1]))
            expected_s += load_s
            if other is berth:
                break
        return expected_s

    def _tell(self) -> None:
        self._changed.set()
        self._on_change()

    async def _look_again(self) -> None:
        """Return when something changed, or after a moment."""
        self._changed.clear()
        try:
            async with asyncio.timeout(LOOK_S):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
