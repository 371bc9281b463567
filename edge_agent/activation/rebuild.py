"""A record for a journal that was lost, from what the store proves: the machine serves on without a controller.

Only variants that were made into models before count, since those were verified when they came; every file is hashed
again. The newest of each model is taken to be in force, at no position, so that the next push decides. What failed here
before is forgotten with the journal: each is tried in a process of its own again, and then is on probation.
"""

import logging
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Protocol

from core.clock import Clock
from core.digest import Digest
from core.errors import NanofleetError
from core.fleet_state import NOWHERE, DesiredState, Slot
from core.ids import AgentId, ModelName, VariantName
from core.manifest import Manifest
from edge_agent.activation.journal import Journal
from edge_agent.activation.record import Record, Trial

_log = logging.getLogger(__name__)


class Store(Protocol):
    def complete_variants(self) -> tuple[Digest, ...]: ...

    def manifest(self, digest: Digest) -> Manifest: ...

    def materialise(self, manifest: Manifest, digest: Digest) -> Path:
        """Hash every file; raise when one is not what the manifest says."""
        ...


def rebuild_if_lost(journal: Journal, store: Store, *, agent_id: AgentId, clock: Clock) -> None:
    """Give `journal` a record again if it lost its own, as far as `store` has something to run."""
    if not journal.is_lost:
        return
    trials = tuple(_newest(sorted(_intact(store), key=lambda slot: (slot.model, -slot.version, slot.manifest_digest))))
    if not trials:
        return
    slots = tuple(trial.slot for trial in trials)
    journal.rebuild(Record(DesiredState(agent_id, NOWHERE, clock.now(), slots), trials=trials))
    models = [f"{slot.model}:{slot.version}" for slot in slots]
    _log.warning("the journal was lost; what the store has serves until the next push", extra={"models": models})


def _newest(slots: list[Slot]) -> Iterator[Trial]:
    for _, versions in groupby(slots, key=lambda slot: slot.model):
        newest, *others = versions
        yield Trial(newest, others[0] if others else None)


def _intact(store: Store) -> Iterator[Slot]:
    for digest in store.complete_variants():
        try:
            manifest = store.manifest(digest)
            store.materialise(manifest, digest)
        except NanofleetError as error:
            _log.warning("a variant in the store is not whole", extra={"digest": digest, "reason": str(error)})
            continue
        yield Slot(ModelName(manifest.model), manifest.version, VariantName(manifest.variant), digest)
