"""By what rules and figures this agent keeps models in memory, made from its settings once, at start."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from edge_agent.runtime.footprint import Footprints, Scales
from edge_agent.runtime.memory import available_bytes
from edge_agent.runtime.residency import ResidencyTerms
from edge_agent.settings import ModelSettings, ResidencySettings

_UNSAID = ModelSettings()


@dataclass(frozen=True, slots=True)
class Hosting:
    """The default has room for everything, and measures nothing."""

    terms: ResidencyTerms = field(default_factory=partial(ResidencyTerms, sys.maxsize))
    footprints: Footprints = field(default_factory=Footprints)
    # None: sizes are estimated from those of the files.
    scales: Scales | None = None
    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    max_wait_s: float = 30.0
    # What the machine has left for models; None: it does not tell.
    available_bytes: Callable[[], int | None] = lambda: None

    def of(self, model: str) -> ModelSettings:
        return self.models.get(model, _UNSAID)


def hosting_by(
    settings: ResidencySettings, models: Mapping[str, ModelSettings], footprints: Footprints, scales: Scales
) -> Hosting:
    """Return the hosting that `settings` ask for, with a budget of what is left now where they name none."""
    left_bytes = _left_for_models(settings.reserve_bytes)
    derived = sys.maxsize if left_bytes is None else left_bytes
    budget_bytes = derived if settings.budget_bytes is None else settings.budget_bytes
    return Hosting(
        ResidencyTerms(budget_bytes, settings.protect_s, settings.protect_loads),
        footprints,
        scales,
        models,
        settings.max_wait_s,
        partial(_left_for_models, settings.reserve_bytes),
    )


def _left_for_models(reserve_bytes: int) -> int | None:
    left = available_bytes()
    return None if left is None else max(0, left - reserve_bytes)
