"""A workshop that opens no file: it answers as it was told, and can be held at a step."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from controller.compression.model import Dataset, Evaluated, EvaluationTask, Inspected, ModelBundle
from core.tensors import Datatype, TensorSpec

INSPECTED = Inspected((TensorSpec("x", Datatype.FP32, (-1, 4)),), (TensorSpec("y", Datatype.FP32, (-1, 2)),))


@dataclass
class FakeWorkshop:
    """`refusal` is raised at the first step; with `is_held`, steps wait for `release`."""

    inspected: Inspected = INSPECTED
    refusal: Exception | None = None
    is_held: bool = False
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    was_cancelled: bool = False
    steps: list[str] = field(default_factory=list)

    async def inspect(self, bundle: ModelBundle) -> Inspected:
        await self._step(f"inspect {bundle.entry_path.parent.name}")
        return self.inspected

    async def quantise(self, recipe: str, bundle: ModelBundle, target: Path, calibration: Dataset | None) -> None:
        await self._step(f"quantise {recipe}")
        target.write_bytes(recipe.encode() + bundle.entry_path.read_bytes()[:2])

    async def evaluate(self, task: EvaluationTask) -> Evaluated:
        await self._step(f"evaluate {task.bundle.entry_path.parent.name}")
        return Evaluated(10.0, 20.0)

    async def _step(self, name: str) -> None:
        self.steps.append(name)
        self.entered.set()
        if self.refusal is not None:
            raise self.refusal
        if not self.is_held:
            return
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
