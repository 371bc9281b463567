"""Which steps lead from what is to what shall be. Pure: no clock, no disk, no waiting.

Order: what is stored already starts first, then the rest is fetched, tried and started, and only then is a model taken
away that nobody wants any more; so nothing stops before what may replace it answers. A model that gets another version
is never unloaded in between: loading replaces it.

A variant in quarantine is never the aim. Its model goes on with what runs, when that is in good standing; else with
the variant that ran before it; else it stops. It also stops when the variant that shall replace it does not start.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from core.digest import Digest
from core.fleet_state import Slot
from core.ids import ModelName


@dataclass(frozen=True, slots=True)
class FetchSlot:
    """Bring the slot's manifest and files into the store."""

    slot: Slot

    @property
    def model(self) -> ModelName:
        return self.slot.model


@dataclass(frozen=True, slots=True)
class SelfTestSlot:
    """Try the stored variant in a process of its own."""

    slot: Slot

    @property
    def model(self) -> ModelName:
        return self.slot.model


@dataclass(frozen=True, slots=True)
class LoadSlot:
    """Load the stored variant, switch to it, and close the one it replaces."""

    slot: Slot

    @property
    def model(self) -> ModelName:
        return self.slot.model


@dataclass(frozen=True, slots=True)
class UnloadModel:
    """Stop serving a model that is in no slot."""

    model: ModelName


Step = FetchSlot | SelfTestSlot | LoadSlot | UnloadModel


@dataclass(frozen=True, slots=True)
class Current:
    """What is: variants wholly stored, the variant that each running model runs, and what is known of variants here."""

    complete: frozenset[Digest]
    running: Mapping[ModelName, Digest]
    # Passed their self-test on this machine, now or before they came into force.
    tested: frozenset[Digest] = frozenset()
    # In quarantine, with what ran before each.
    fallbacks: Mapping[Digest, Slot | None] = field(default_factory=dict)


def plan(slots: Sequence[Slot], current: Current, *, on_hold: Collection[ModelName] = ()) -> tuple[Step, ...]:
    """Return the steps from `current` to `slots`, leaving out those for models in `on_hold`."""
    goals = aims(slots, current)
    stored = [slot for slot in goals if slot.manifest_digest in current.complete]
    missing = [slot for slot in goals if slot.manifest_digest not in current.complete]
    steps: list[Step] = [step for slot in stored for step in _start(slot, current)]
    for slot in missing:
        steps += [FetchSlot(slot), *_start(slot, current)]
    wanted = {slot.model for slot in goals} | _kept(slots, current)
    steps += [UnloadModel(model) for model in sorted(current.running) if model not in wanted]
    # What is to replace a variant in quarantine has failed, and may be tried again: until then nothing answers.
    held = sorted(wanted.intersection(on_hold))
    faulty = [UnloadModel(model) for model in held if current.running.get(model) in current.fallbacks]
    return (*(step for step in steps if step.model not in on_hold), *faulty)


def aims(slots: Sequence[Slot], current: Current) -> tuple[Slot, ...]:
    """Return what shall run for `slots` where something has to change or stay that is in good standing."""
    kept = _kept(slots, current)
    found = (_in_good_standing(slot, current.fallbacks) for slot in slots if slot.model not in kept)
    return tuple(slot for slot in found if slot is not None)


def _kept(slots: Sequence[Slot], current: Current) -> frozenset[ModelName]:
    """Return the models whose slot is in quarantine while another variant, in good standing, runs."""
    fallbacks, running = current.fallbacks, current.running
    return frozenset(
        slot.model
        for slot in slots
        if slot.manifest_digest in fallbacks and running.get(slot.model, slot.manifest_digest) not in fallbacks
    )


def _in_good_standing(slot: Slot, fallbacks: Mapping[Digest, Slot | None]) -> Slot | None:
    found: Slot | None = slot
    passed: set[Digest] = set()
    while found is not None and found.manifest_digest in fallbacks:
        if found.manifest_digest in passed:
            return None
        passed.add(found.manifest_digest)
        found = fallbacks[found.manifest_digest]
    return found


def _start(slot: Slot, current: Current) -> Iterator[Step]:
    if current.running.get(slot.model) == slot.manifest_digest:
        return
    if slot.manifest_digest not in current.tested:
        yield SelfTestSlot(slot)
    yield LoadSlot(slot)
