"""Having chunks encoded before they are sent, for each pair of variants that an order names, once.

Orders come from agents, so the work is bounded: pairs are of one model, each is prepared once for all agents, one after
another, in the task of `run`. An order waits for its pairs for a while and is then told to come back.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

from controller.transfer.model import Packs, Variant
from core.clock import Clock
from core.digest import Digest
from core.errors import NanofleetError

# Chosen: pairs that are known to be prepared, or not to be for now; some 300 bytes each.
_REMEMBERED_PAIRS = 1024
# Chosen: more variants than are released while one is prepared.
_MAX_WAITING = 256
# Chosen: a preparation that failed, for example for lack of disk, is not tried for every order.
_FAILURE_PAUSE_S = 60.0

_log = logging.getLogger(__name__)

_Pair = tuple[Digest, Digest | None]


class Readiness(Enum):
    READY = "ready"
    # In full, and perhaps as some of the differences; others failed lately or were too many to ask for.
    PARTLY = "partly"
    PENDING = "pending"
    # It failed lately: chunks go as they are.
    FAILED = "failed"


class Preparations:
    def __init__(self, packs: Packs, *, clock: Clock) -> None:
        self._packs = packs
        self._clock = clock
        self._waiting: asyncio.Queue[tuple[Variant, Variant | None]] = asyncio.Queue(_MAX_WAITING)
        self._pending: dict[_Pair, asyncio.Event] = {}
        # When each failed; None: it is prepared.
        self._outcomes: OrderedDict[_Pair, float | None] = OrderedDict()

    async def run(self) -> None:
        """Prepare what is asked for, for ever."""
        while True:
            to, held = await self._waiting.get()
            pair = _pair(to, held)
            try:
                await self._packs.prepare(to.manifest, () if held is None else (held.manifest,))
                self._remember(pair, None)
            except (NanofleetError, OSError) as error:
                self._remember(pair, self._clock.monotonic_s())
                variant = {"model": to.manifest.model, "version": to.manifest.version, "variant": to.manifest.variant}
                _log.warning(
                    "chunks could not be prepared; they go as they are", extra=variant | {"reason": str(error)}
                )
            finally:
                self._pending.pop(pair).set()

    async def ready(self, to: Variant, held: Sequence[Variant], *, wait_s: float) -> Readiness:
        """Ask for `to` in full and as differences to each of `held`, and wait a while for it."""
        pairs: list[Variant | None] = [*held] or [None]
        events = [event for source in pairs if (event := self._ask(to, source)) is not None]
        try:
            async with asyncio.timeout(wait_s):
                for event in events:
                    await event.wait()
        except TimeoutError:
            return Readiness.PENDING
        outcomes = [self._outcomes.get(_pair(to, source), 0.0) for source in pairs]
        if None not in outcomes:
            return Readiness.FAILED
        # Any of them brings `to` in full, which is enough to go on with.
        return Readiness.READY if outcomes == [None] * len(outcomes) else Readiness.PARTLY

    def begin(self, to: Variant, held: Sequence[Variant]) -> None:
        """Ask for `to` as differences to each of `held` before anybody waits for it, as far as there is room."""
        for source in held:
            self._ask(to, source)

    def forget(self, to: Digest) -> None:
        """Have `to` prepared anew by the next order: what was prepared is damaged."""
        for pair in [pair for pair in self._outcomes if pair[0] == to]:
            del self._outcomes[pair]

    def _ask(self, to: Variant, held: Variant | None) -> asyncio.Event | None:
        """Return what to wait for; None when it is settled, or too much is asked for already."""
        pair = _pair(to, held)
        if pair in self._pending:
            return self._pending[pair]
        if self._is_settled(pair) or self._waiting.full():
            return None
        self._waiting.put_nowait((to, held))
        event = self._pending[pair] = asyncio.Event()
        return event

    def _is_settled(self, pair: _Pair) -> bool:
        if pair not in self._outcomes:
            return False
        failed_at_s = self._outcomes[pair]
        return failed_at_s is None or self._clock.monotonic_s() - failed_at_s < _FAILURE_PAUSE_S

    def _remember(self, pair: _Pair, failed_at_s: float | None) -> None:
        self._outcomes[pair] = failed_at_s
        self._outcomes.move_to_end(pair)
        if len(self._outcomes) > _REMEMBERED_PAIRS:
            self._outcomes.popitem(last=False)


def _pair(to: Variant, held: Variant | None) -> _Pair:
    return to.digest, None if held is None else held.digest
