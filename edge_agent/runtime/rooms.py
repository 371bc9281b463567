"""Who takes memory now, as the decider wants to know it, and what it answers to who wants in."""

import logging
import math
from dataclasses import replace
from functools import partial

from core.clock import Clock
from edge_agent.runtime.berth import Berth, Phase, Want
from edge_agent.runtime.residency import Admit, Frequencies, Need, Refuse, ResidencyTerms, Resident, Room, make_room

_log = logging.getLogger(__name__)

# A prewarmed model is worth as much as one that was asked once just now.
_PREWARMED = 1.0


class Rooms:
    """`patience_s`: how long a variant waits for room beside the one that it replaces."""

    def __init__(self, terms: ResidencyTerms, *, patience_s: float, clock: Clock) -> None:
        self.berths: dict[str, Berth] = {}
        self._terms = terms
        self._patience_s = patience_s
        self._clock = clock
        self._frequencies = Frequencies(now_s=clock.monotonic_s())

    def room_for(self, want: Want, *, available_bytes: int | None) -> Room:
        """Ask for room beside the variant that is replaced and, only where that is in vain, for its room."""
        now_s = self._clock.monotonic_s()
        waited_s = math.inf if want.is_urgent else now_s - want.since_s
        need = Need(want.berth.key, want.berth.footprint.peak_bytes, want.berth.footprint.load_s, waited_s)
        room = partial(make_room, need, terms=self._terms, now_s=now_s, available_bytes=available_bytes)
        residents, old = self._residents(now_s), want.replaces
        if old is None or old.taken_bytes == 0:
            return room(residents)
        beside = room([replace(one, is_pinned=one.is_pinned or one.name == old.key) for one in residents])
        if isinstance(beside, Admit) or old.phase is not Phase.RESIDENT or old.open is None:
            return beside
        instead = room([one for one in residents if one.name != old.key])
        is_in_vain = isinstance(beside, Refuse) or now_s - want.since_s >= self._patience_s
        if is_in_vain and isinstance(instead, Admit):
            _log.warning("no room for both variants: the old one leaves first", extra={"model": old.name})
            old.replaced_by = want.berth
            return Admit((old.key,))
        return beside

    def _residents(self, now_s: float) -> list[Resident]:
        uses: dict[str, int] = {}
        for berth in self.berths.values():
            uses[berth.name] = uses.get(berth.name, 0) + berth.model.uses - berth.uses_seen
            berth.uses_seen = berth.model.uses
        self._frequencies.add(uses, now_s=now_s)
        return [self._resident(berth) for berth in self.berths.values() if berth.taken_bytes]

    def _resident(self, berth: Berth) -> Resident:
        return Resident(
            berth.key,
            berth.taken_bytes,
            berth.footprint.load_s,
            max(self._frequencies.of(berth.name), _PREWARMED if berth.is_prewarmed else 0.0),
            berth.loaded_at_s,
            is_pinned=berth.never_leaves,
            is_busy=not berth.model.batcher.is_idle,
            is_leaving=berth.phase is Phase.LEAVING,
        )
