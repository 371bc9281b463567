"""Which steps lead from what is to what shall be. Pure: no clock, no disk, no waiting.

Order: what is stored already starts first, then the rest is fetched and started, and only then is a model taken away
that nobody wants any more; so nothing stops before what may replace it answers. A model that gets another version is
never unloaded in between: loading replaces it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

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


Step = FetchSlot | LoadSlot | UnloadModel


@dataclass(frozen=True, slots=True)
class Current:
    """What is: variants wholly stored, and the variant that each running model runs."""

    complete: frozenset[Digest]
    running: Mapping[ModelName, Digest]


def plan(slots: Sequence[Slot], current: Current, *, on_hold: Collection[ModelName] = ()) -> tuple[Step, ...]:
    """Return the steps from `current` to `slots`, leaving out those for models in `on_hold`."""
    stored = [slot for slot in slots if slot.manifest_digest in current.complete]
    missing = [slot for slot in slots if slot.manifest_digest not in current.complete]
    wanted = {slot.model for slot in slots}
    steps: list[Step] = [LoadSlot(slot) for slot in stored if not _runs(slot, current)]
    for slot in missing:
        steps.append(FetchSlot(slot))
        if not _runs(slot, current):
            steps.append(LoadSlot(slot))
    steps += [UnloadModel(model) for model in sorted(current.running) if model not in wanted]
    return tuple(step for step in steps if step.model not in on_hold)


def _runs(slot: Slot, current: Current) -> bool:
    return current.running.get(slot.model) == slot.manifest_digest
