"""The models that this agent runs, by name, and the way a new variant takes the place of the old one.

    load ─▶ measured? ─▶ Loader: room, open, warm up ─▶ switch in one step ─▶ the old one drains and is closed
    find ─▶ LoadedModel.admit ─▶ (in memory) run, or (cold) the Loader brings it in

A load that fails leaves the running variant alone. A model that was loaded once is hosted: whether it is in memory at a
moment is the Loader's to decide, within the budget of `[residency]`.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from core.clock import Clock
from core.digest import Digest
from core.errors import ModelNotReady, UnknownModel
from core.ids import ModelName
from core.manifest import Manifest
from edge_agent.runtime.berth import Berth, LoadCounts, Residency
from edge_agent.runtime.footprint import Footprint, estimated
from edge_agent.runtime.hosting import Hosting
from edge_agent.runtime.loader import Loader
from edge_agent.runtime.model import LoadedModel, joint_rows
from edge_agent.runtime.opening import open_model
from edge_agent.runtime.session import RunTime
from edge_agent.runtime.threads import RunThreads, available_cores
from edge_agent.runtime.vitals import Watch
from edge_agent.settings import RuntimeSettings

__all__ = ["LoadedModel", "ModelPool"]

_log = logging.getLogger(__name__)

# Chosen: who is in memory changes many times a second on a small board, and every word of it goes over the air.
ANNOUNCE_S = 5.0


class ModelPool:
    """The hosted models; implements `ModelHost` of `edge_agent.reconcile`."""

    def __init__(self, settings: RuntimeSettings, *, clock: Clock, hosting: Hosting | None = None) -> None:
        """`hosting` None: there is room for all of them."""
        self._settings = settings
        self._clock = clock
        self._hosting = hosting = hosting or Hosting()
        self._models: dict[str, LoadedModel] = {}
        self._berths: dict[str, Berth] = {}
        self._arriving: dict[str, Footprint | None] = {}
        self._observers: list[Callable[[], None]] = []
        self._announcement: asyncio.TimerHandle | None = None
        self._loader = Loader(
            hosting.terms,
            clock=clock,
            max_wait_s=hosting.max_wait_s,
            available_bytes=hosting.available_bytes,
            on_change=self._announce_soon,
        )
        # A run takes as many cores as it has threads inside.
        self._threads = RunThreads(max(1, available_cores() // settings.intra_op_threads))

    async def load(self, manifest: Manifest, digest: Digest, folder: Path) -> None:
        """Load, warm up, switch, then drain and close the variant that ran before.

        Raises:
            InvalidModel: ONNX Runtime does not take it, or it contradicts its manifest.
            TooLarge: the memory budget has no room for it.
        """
        self._arriving[manifest.model] = None
        try:
            footprint = self._arriving[manifest.model] = await self._footprint(manifest, digest, folder)
            berth = self._new_berth(manifest, digest, folder, footprint)
            self._loader.add(berth)
            try:
                await self._loader.bring_in(berth, replaces=self._berths.get(manifest.model))
            except BaseException:
                self._loader.discard(berth)
                raise
        finally:
            self._arriving.pop(manifest.model, None)
        await self._switch(berth)

    async def host(self, model: LoadedModel) -> None:
        """Put a model that was opened elsewhere in the place of the one of its name; it never leaves memory."""
        berth = Berth(model, None, Footprint(0, 0, 0.0))
        self._loader.add(berth)
        await self._switch(berth)

    async def unload(self, model: ModelName) -> None:
        berth = self._berths.pop(model, None)
        if berth is not None:
            del self._models[model]
            _log.info("model was unloaded", extra={"model": model, "version": berth.model.version})
            self._notify()
            await self._loader.retire(berth, drain_timeout_s=self._settings.drain_timeout_s)

    def running(self) -> Mapping[ModelName, Digest]:
        return {ModelName(name): model.digest for name, model in self._models.items()}

    def watch(self, model: ModelName) -> Watch:
        """Return a new watch over the running model of that name.

        Raises:
            UnknownModel: it does not run.
        """
        return self.find(model).watch()

    def models(self) -> Sequence[LoadedModel]:
        return tuple(self._models.values())

    @property
    def queued(self) -> int:
        return sum(model.batcher.queued for model in self._models.values())

    def find(self, name: str, version: str = "") -> LoadedModel:
        """Return the hosted model of that name; an empty version means whichever runs.

        Raises:
            UnknownModel: no such model, or not that version.
            ModelNotReady: it is being loaded for the first time.
        """
        model = self._models.get(name)
        if model is None:
            raise self._absent(name)
        if version and version != model.version:
            raise UnknownModel(f"model {name}: this agent runs version {model.version}, got {version[:80]!r}")
        return model

    async def keep_resident(self, name: str) -> None:
        """Load a hosted model by hand: it stays in memory until it is unloaded. Raises what `Loader.keep` raises."""
        await self._loader.keep(self._berth_of(name))

    async def park(self, name: str) -> None:
        """Unload a hosted model by hand: it answers nothing until it is loaded. Raises what `Loader.park` raises."""
        await self._loader.park(self._berth_of(name))

    def residency(self, name: str) -> Residency:
        return self._berth_of(name).residency()

    @property
    def budget_bytes(self) -> int:
        return self._hosting.terms.budget_bytes

    @property
    def taken_bytes(self) -> int:
        """What models take now, as they were measured."""
        return self._loader.taken_bytes

    @property
    def load_counts(self) -> LoadCounts:
        return self._loader.counts

    def on_change(self, observer: Callable[[], None]) -> None:
        """Call `observer` when a model came or went, and now and then when one came into memory or left it."""
        self._observers.append(observer)

    async def close(self) -> None:
        """Answer what waits, then free every model."""
        await self._loader.stop()
        for name in list(self._models):
            await self.unload(ModelName(name))
        self._loader.close()
        self._threads.close()
        if self._announcement is not None:
            self._announcement.cancel()

    def _berth_of(self, name: str) -> Berth:
        return self._berths[self.find(name).manifest.model]

    def _absent(self, name: str) -> Exception:
        if name not in self._arriving:
            return UnknownModel(f"model {name[:80]!r}: this agent runs {sorted(self._models) or 'no model'}")
        refusal = ModelNotReady(f"model {name}: is being loaded; try again later")
        footprint = self._arriving[name]
        return refusal if footprint is None else refusal.after(footprint.load_s)

    async def _footprint(self, manifest: Manifest, digest: Digest, folder: Path) -> Footprint:
        """Return what a variant takes, measured now if it was not before: never while requests wait for it."""
        known = self._hosting.footprints.get(digest)
        if known is None and self._hosting.scales is not None:
            known = await self._hosting.scales.measure(manifest, folder)
        return known or estimated(manifest)

    def _new_berth(self, manifest: Manifest, digest: Digest, folder: Path, footprint: Footprint) -> Berth:
        settings, terms = self._settings, self._hosting.of(manifest.model)
        model = LoadedModel(
            manifest,
            digest,
            None,
            run_time=RunTime(0, 0),
            settings=settings,
            clock=self._clock,
            threads=self._threads,
        )
        max_batch = joint_rows(manifest, settings)
        opening = partial(open_model, manifest, folder, intra_op_threads=settings.intra_op_threads, max_batch=max_batch)
        return Berth(model, opening, footprint, is_pinned=terms.pinned, is_prewarmed=terms.prewarm)

    async def _switch(self, berth: Berth) -> None:
        name = berth.name
        previous = self._berths.get(name)
        self._models[name], self._berths[name] = berth.model, berth
        _log.info("model is running", extra={"model": name, "version": berth.model.version})
        self._notify()
        if previous is None:
            return
        berth.is_kept = previous.is_kept
        await self._loader.retire(previous, drain_timeout_s=self._settings.drain_timeout_s)
        if previous.is_parked:
            await self._loader.park(berth)

    def _announce_soon(self) -> None:
        if self._announcement is None and self._observers:
            self._announcement = asyncio.get_running_loop().call_later(ANNOUNCE_S, self._announce)

    def _announce(self) -> None:
        self._announcement = None
        self._notify()

    def _notify(self) -> None:
        for observer in self._observers:
            observer()
